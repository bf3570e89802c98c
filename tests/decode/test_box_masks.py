"""Masks from boxes: drawn by a MedPLIB checkpoint's SAM-Med2D, prompted as SAM is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medplib_jax.checkpoint import load_params
from medplib_jax.data import images
from medplib_jax.decode.box_masks import BoxDrawer
from medplib_jax.models.layers import abstract_module, bind
from medplib_jax.models.masks.sam import SamMed2d, normalise_sam
from medplib_jax.models.masks.unpad import resample_to_canvas

HEIGHT, WIDTH = 20, 40
PICTURE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture(scope="module")
def drawer(workdir):
    return BoxDrawer(workdir)


def test_a_box_prompts_the_decoder_where_it_lies_on_the_padded_canvas(workdir, drawer):
    experiment, params, _ = load_params(str(workdir))
    config = experiment.model.mask
    side = config.image_size
    abstract = abstract_module(lambda rngs: SamMed2d(config, rngs))
    pixels, (top, left, height, width) = images.sam_pixels(PICTURE, side)
    assert (left, width, height) == (0, side, side // 2) and top == side // 4
    place, scale = np.array([[top, left, height, width]]), side / WIDTH

    @jax.jit
    def draw(params):
        sam = bind(abstract, params)
        embedding = sam.encode(normalise_sam(pixels[None], place))
        box = jnp.array([[4 * scale, top + 2 * scale, 24 * scale, top + 12 * scale]])
        prompt, dense = sam.prompt_encoder.sparse(boxes=box)[None], sam.prompt_encoder.dense()
        logits, iou = sam.mask_decoder(embedding, sam.prompt_encoder.grid_position(), prompt, dense)
        shape = {"canvas": (HEIGHT, WIDTH), "sam_size": side, "mode": config.unpad}
        return resample_to_canvas(logits, place, np.array([[HEIGHT, WIDTH]]), **shape)[0], iou

    drawn, iou = draw(params["sam"])
    (mask,), (found,) = drawer(PICTURE, [(4, 2, 24, 12)])
    assert mask.shape == (HEIGHT, WIDTH) and found == pytest.approx(float(iou[0, 0]), abs=1e-4)
    certain = np.abs(np.asarray(drawn[0, 0])) > 1e-3
    np.testing.assert_array_equal(mask[certain], np.asarray(drawn[0, 0])[certain] > 0)


def test_boxes_that_leave_the_picture_or_lie_upside_down_are_put_right(drawer):
    masks, _ = drawer(PICTURE, [(4, 2, 40, 20), (44, 25, 4, 2), (0, 0, 40, 20)])
    np.testing.assert_array_equal(masks[0], masks[1])
    assert drawer(PICTURE, []) == ((), ())


def test_of_the_checkpoint_only_the_mask_part_is_read(workdir):
    _, params, _ = load_params(str(workdir), part="sam")
    assert params.keys() == {"sam"}
    with pytest.raises(ValueError, match="expected a model with the part 'ear', found none"):
        load_params(str(workdir), part="ear")
