"""One picture, one question: the prompt that the model gets, the files that are written, and what is refused."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medplib_jax import predict
from medplib_jax.data.errors import DataError
from medplib_jax.decode import generator as decode
from medplib_jax.decode.predictor import place_region
from tests.evaluate.evaluators import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    tiny.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def predictor(workdir):
    return predict.Predictor(workdir)


def test_region_takes_its_place():
    assert place_region("What is <region>?", "point:1,2") == "What is <region>point:1,2</region>?"
    assert place_region("What is <region></region>?", "/a\\1.png") == "What is <region>/a\\1.png</region>?"
    assert place_region("What is it?", "box:0,0,1,1") == "What is it? <region>box:0,0,1,1</region>"
    assert place_region("What is it?", "") == "What is it?"
    with pytest.raises(ValueError, match="has 1 <region>, expected none"):
        place_region("What is <region>?", "")
    with pytest.raises(ValueError, match="has 2 <region>, expected at most 1"):
        place_region("<region> or <region>?", "point:1,2")


@pytest.mark.parametrize("region", ["point:5,20", "box:0,0,14,40", "scribble:2,5 6,30", "mask"])
def test_region_is_in_the_prompt(predictor, folder, region):
    region = str(folder / "masks" / "left-ct_00--a.png") if region == "mask" else region
    picture, prompt = predictor.prompt(folder / "images" / "ct_00--a.png", "What is it?", region)
    assert picture.shape == (40, 30, 3) and prompt.mask_size.tolist() == [[40, 30]]
    points = prompt.region_points[0, 0][prompt.region_point_valid[0, 0]]
    assert len(points) and (points[:, 0] < 0.5).all()  # the left half
    assert (prompt.feature_index == 4).sum() == 1  # behind the image's four patches


def test_no_region_no_slot(predictor, folder):
    _, prompt = predictor.prompt(folder / "images" / "ct_00--a.png", "<image>\nWhat is it?")
    assert prompt.region_points.shape[1] == 0 and prompt.feature_index.max() == 3


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ("point:300,2", r"outside the picture .point:300,2.*expected x in \[0, 30\], y in \[0, 40\]"),
        ("box:1,2", "region cannot be read"),
        ("/lost/mask.png", "file is missing"),
        ("masks/right-mr_00--b.png", "mask and picture differ in size.*expected 40 x 30"),
    ],
)
def test_bad_region_is_named(predictor, folder, region, message):
    region = str(folder / region) if region.startswith("masks") else region
    with pytest.raises(DataError, match=message):
        predictor.prompt(folder / "images" / "ct_00--a.png", "What is it?", region)


def test_command_line_writes_masks_of_the_pictures_size(folder, workdir, tmp_path, monkeypatch, capsys):
    arguments = [
        "--checkpoint",
        workdir,
        "--image",
        folder / "images" / "mr_00--b.png",
        "--question",
        "Where is it?",
        "--out",
        tmp_path,
    ]
    monkeypatch.setattr(
        sys, "argv", ["predict", *map(str, arguments), "--max-new-tokens", "1", "--mask-threshold", "0.0001"]
    )
    seg_id = tiny.make_tokenizer(tmp_path / "tokenizer").seg_id
    monkeypatch.setattr(
        decode, "draw_token", lambda logits, draws, place: jnp.full(logits.shape[:1], seg_id, jnp.int32)
    )
    predict.main()
    assert capsys.readouterr().out == "<SEG>\n"
    mask, shown = (np.asarray(Image.open(tmp_path / name)) for name in ("mask_0.png", "overlay.png"))
    assert mask.shape == (24, 48) and (mask == 255).all() and shown.shape == (24, 48, 3)
    assert (shown[0] == [0, 114, 178]).all()  # the mask's outline


@pytest.mark.parametrize("arguments", [["--image", "/lost.png"], ["--temperature", "-1"], ["--checkpoint", "/lost"]])
def test_command_line_says_what_is_wrong(folder, workdir, tmp_path, monkeypatch, arguments):
    base = [
        "--checkpoint",
        workdir,
        "--image",
        folder / "images" / "mr_00--b.png",
        "--question",
        "What?",
        "--out",
        tmp_path,
    ]
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, base), *arguments])
    with pytest.raises(SystemExit, match="error: .*(lost|temperature -1)"):
        predict.main()
