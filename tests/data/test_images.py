"""Pixels against the original's, every kind of picture file, and files that must be refused."""

import numpy as np
import pytest
from PIL import Image

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.models.vision.clip import normalise_clip
from tests.paths import GOLDEN

PREPROCESS = GOLDEN / "preprocess"
ARRAYS = np.load(PREPROCESS / "arrays.npz")


def inside(canvas, box):
    top, left, height, width = box
    return canvas[top : top + height, left : left + width]


@pytest.mark.parametrize("name", ["synth_wide", "synth_large"])
def test_pixels_equal_the_originals(name):
    rgb = images.load_image(str(PREPROCESS / f"{name}.png"))
    sam, box = images.sam_pixels(rgb, 256)
    np.testing.assert_array_equal(inside(sam, box), ARRAYS[f"{name}_sam_resized_u8"])
    np.testing.assert_array_equal(box[2:], ARRAYS[f"{name}_resize"])
    _, box = images.to_canvas(rgb, 336, (0, 0, 0))
    np.testing.assert_array_equal(inside(images.clip_pixels(rgb, 336), box), ARRAYS[f"{name}_clip_resized_u8"])
    mask = images.load_mask(str(PREPROCESS / f"{name}_mask.png"), rgb.shape[:2])
    np.testing.assert_array_equal(mask, ARRAYS[f"{name}_gt_mask"])


@pytest.mark.parametrize("name", ["synth_wide", "synth_large"])
def test_a_smaller_tower_sees_the_originals_pixels(name):
    """Which are resized from the canvas of 336 pixels, not from the picture."""
    clip = images.clip_pixels(images.load_image(str(PREPROCESS / f"{name}.png")), 56)
    np.testing.assert_allclose(normalise_clip(clip).transpose(2, 0, 1), ARRAYS[f"{name}_image_clip_56"], atol=1e-6)


def test_sizes_equal_the_originals():
    for height, width, side, *expected in ARRAYS["preprocess_shapes"]:
        assert images.fit((height, width), side) == tuple(expected)


@pytest.mark.parametrize("size", [(61, 287), (200, 150), (512, 512), (17, 40)])
def test_grey_in_one_channel_gives_what_three_give(tmp_path, size):
    grey = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    path = str(tmp_path / "a.png")
    for stored in (grey, np.repeat(grey[..., None], 3, axis=2)):
        Image.fromarray(stored).save(path)
        np.testing.assert_array_equal(images.load_pixels(path), grey)
        rgb = images.load_image(path)
        assert rgb.shape == (*size, 3)
        for side in (336, 256):
            one, three = images.load_pixels(path), rgb
            np.testing.assert_array_equal(images.clip_pixels(one, side), images.clip_pixels(three, side))
            np.testing.assert_array_equal(images.sam_pixels(one, side)[0], images.sam_pixels(three, side)[0])


def test_one_coloured_pixel_is_enough(tmp_path):
    rgb = np.full((40, 40, 3), 9, np.uint8)
    rgb[7, 3, 2] = 10
    Image.fromarray(rgb).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.load_pixels(str(tmp_path / "a.png")), rgb)


def test_canvas_is_centred_and_padded_with_its_colour():
    rgb = np.full((10, 7, 3), 200, np.uint8)
    canvas, box = images.to_canvas(rgb, 20, images.CLIP_PAD_COLOUR)
    assert box == (0, 3, 20, 14)
    assert (canvas[:, :3] == images.CLIP_PAD_COLOUR).all() and (canvas[:, 17:] == images.CLIP_PAD_COLOUR).all()
    assert (inside(canvas, box) == 200).all()
    sam, box = images.sam_pixels(np.full((7, 10, 3), 200, np.uint8), 15)  # an odd rest: the smaller half on top
    assert box == (2, 0, 11, 15)
    assert not sam[:2].any() and not sam[13:].any()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = str(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode).save(path)
    rgb = images.load_image(path)
    assert rgb.shape == (4, 6, 3) and rgb.dtype == np.uint8
    assert (rgb > 250).all()


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    path = str(tmp_path / "a.png")
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(path)
    assert images.load_image(path)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_exif_rotation_is_applied(tmp_path):
    path = str(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (6, 4)).save(path, exif=exif)
    assert images.load_image(path).shape == (6, 4, 3)


def test_any_grey_value_from_one_is_mask(tmp_path):
    path = str(tmp_path / "m.png")
    Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).save(path)
    assert images.load_mask(path, (1, 4)).tolist() == [[0, 1, 1, 1]]


def test_a_mask_of_another_size_is_refused(tmp_path):
    path = str(tmp_path / "m.png")
    Image.new("L", (6, 4)).save(path)
    with pytest.raises(
        DataError, match=r"m.png: mask and picture differ in size; expected 6 x 4 \(h x w\), found 4 x 6"
    ):
        images.load_mask(path, (6, 4))


def test_masks_of_odd_modes(tmp_path):
    path, notices = str(tmp_path / "m.png"), []
    Image.fromarray(np.array([[0, 1, 256, 65535]], np.uint16)).save(path)
    assert images.load_mask(path, (1, 4), notices).tolist() == [[0, 1, 1, 1]]
    assert [notice.found for notice in notices] == ["mode I;16, 4 x 1 pixels", "1, 256, 65535"]
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("L", (6, 4), 255).save(path, exif=exif)
    with pytest.raises(DataError, match="mask is rotated by EXIF"):
        images.load_mask(path, (4, 6))
    Image.new("F", (6, 4), 0.5).save(tmp_path / "m.tiff")
    with pytest.raises(DataError, match="mask has floating-point pixels"):
        images.load_mask(str(tmp_path / "m.tiff"), (4, 6))


DISC = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 20
MASK_FILES = {  # how a mask of DISC is stored -> what is noted
    "m.png": (lambda: Image.fromarray(DISC.astype(np.uint8)), ""),
    "m.jpg": (lambda: Image.fromarray(DISC.astype(np.uint8) * 255), "lossy"),
    "m.webp": (lambda: Image.fromarray(DISC.astype(np.uint8) * 255), "lossy"),
    "white_alpha.png": (lambda: with_alpha(np.full((64, 64, 3), 255, np.uint8)), "transparent"),
    "black_alpha.png": (lambda: with_alpha(np.zeros((64, 64, 3), np.uint8)), "transparent"),
    "red_on_white.png": (lambda: with_alpha(np.where(DISC[..., None], (200, 0, 0), 255).astype(np.uint8)), "transp"),
    "grey_alpha.png": (lambda: with_alpha(np.full((64, 64), 128, np.uint8)), "transparent"),
    "light.png": (lambda: with_palette((250, 240, 230), (10, 200, 90)), "palette without black"),
    "dark.png": (lambda: with_palette((0, 0, 0), (128, 0, 0)), ""),
    "labels.png": (lambda: Image.fromarray(np.where(DISC, 2, 0).astype(np.uint8) + DISC * (ARRAY > 30)), "several"),
}
ARRAY = np.mgrid[:64, :64][0].astype(np.uint8)


def with_alpha(colour):
    return Image.fromarray(np.dstack([colour, DISC.astype(np.uint8) * 255]))


def with_palette(*colours):
    image = Image.fromarray(DISC.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("name", MASK_FILES)
def test_a_mask_is_read_as_it_is_meant_however_it_is_stored(tmp_path, name):
    make, noted = MASK_FILES[name]
    path, notices = str(tmp_path / name), []
    make().save(path)
    mask = images.load_mask(path, (64, 64), notices)
    assert np.count_nonzero(mask != DISC) <= (40 if noted == "lossy" else 0)  # a tenth of the outline's pixels
    assert abs(int(mask.sum()) - int(DISC.sum())) < 0.01 * DISC.sum()
    assert (
        any(noted in notice.what for notice in notices)
        if noted
        else "mask" not in str([notice.what for notice in notices])
    )


def test_a_lossless_webp_keeps_small_values(tmp_path):
    path = str(tmp_path / "m.webp")
    Image.fromarray(np.dstack([np.where(DISC, 1, 0) + DISC * (ARRAY > 30) * 200] * 3).astype(np.uint8)).save(
        path, lossless=True
    )
    np.testing.assert_array_equal(images.load_mask(path, (64, 64)), DISC)


def test_sixteen_bits_of_which_twelve_are_used_are_noted_and_shown_in_a_window(tmp_path):
    path, notices = str(tmp_path / "ct.png"), []
    values = np.repeat(np.array([[0, 1024 - 160, 1024 + 40, 1024 + 240, 4095]], np.uint16), 20, axis=0)
    Image.fromarray(np.repeat(values, 20, axis=1)).save(path)
    assert images.load_pixels(path, notices).max() == 15
    assert [notice.what for notice in notices][1:] == ["picture of 16 bits keeps 16 levels of grey"]
    shown = images.load_pixels(path, window=(1024 + 40, 400))
    assert shown[0, [0, 30, 50, 70, 99]].tolist() == [0, 0, 128, 255, 255]


def test_plain_pictures_give_no_notice(tmp_path):
    path, notices = str(tmp_path / "a.png"), []
    for mode in ("1", "L", "RGB"):
        Image.new(mode, (20, 30)).save(path)
        images.load_image(path, notices)
    assert notices == []


def test_an_unreadable_picture_is_refused(tmp_path):
    broken = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:900])
    for path in (broken, tmp_path / "b.png"):
        path.touch()
        with pytest.raises(DataError, match="picture cannot be read; expected an image file"):
            images.load_image(str(path))


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = str(tmp_path / "a.png")
    Image.new("L", (50, 50)).save(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 2499)
    with pytest.raises(DataError, match="picture is too large; expected at most 2499 pixels, found 50 x 50"):
        images.load_image(path)


def test_a_large_mask_shrinks_to_the_canvas():
    mask = np.zeros((100, 40), np.uint8)
    mask[:50] = 1
    small = images.mask_on_canvas(mask, 20)
    assert small.shape == (20, 8)
    assert small[:10].all() and not small[10:].any()
    assert images.mask_on_canvas(mask, 100) is mask
