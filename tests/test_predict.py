"""One picture, one question: the prompt that the model gets, the files that are written, and what is refused."""

import ast
import io
import json
import shutil
import subprocess
import sys

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medplib_jax import predict
from medplib_jax.data.errors import DataError
from medplib_jax.datasets.index import build, library_of_pairs
from medplib_jax.decode import generator as decode
from medplib_jax.decode.predictor import Predictor, place_regions, read_question
from medplib_jax.parallel.compilation import Compilations
from tests.evaluate.evaluators import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="module")
def predictor(workdir):
    return predict.Predictor(workdir)


def test_region_takes_its_place():
    assert place_regions("What is <region>?", {"": "point:1,2"}) == "What is <region>point:1,2</region>?"
    assert place_regions("What is <region></region>?", {"": "/a\\1.png"}) == "What is <region>/a\\1.png</region>?"
    assert place_regions("What is it?", {"": "box:0,0,1,1"}) == "What is it? <region>box:0,0,1,1</region>"
    assert place_regions("What is it?", {}) == "What is it?"
    with pytest.raises(ValueError, match="has 1 <region>, expected none"):
        place_regions("What is <region>?", {})
    with pytest.raises(ValueError, match="has 2 <region>, expected at most 1"):
        place_regions("<region> or <region>?", {"": "point:1,2"})


def test_several_regions_go_to_their_names_or_follow_in_their_order():
    tags = {name: f"<region>point:{k},{k}</region>" for k, name in enumerate("abc")}
    given = {name: tag[8:-9] for name, tag in tags.items()}
    assert place_regions("Is {b} like {a}, or {b}?", {k: given[k] for k in "ab"}) == (
        f"Is {tags['b']} like {tags['a']}, or {tags['b']}?"
    )
    assert place_regions("<region> or <region>, not {b}?", given) == f"{tags['a']} or {tags['c']}, not {tags['b']}?"
    assert place_regions("Which?", given) == f"Which? {tags['a']} {tags['b']} {tags['c']}"
    with pytest.raises(ValueError, match="has 1 <region>, expected none or 2"):
        place_regions("<region> or {b}?", given)


def test_shares_of_the_picture_are_its_pixels(folder):
    image = folder / "images" / "ct_00--a.png"
    asked = read_question(image, "What is it?", "box:0.1,0.25,0.5,1", normalized=True)
    assert asked.record.turns[0][1].endswith("<region>box:3.0000,10.0000 15.0000,40.0000</region>")
    with pytest.raises(DataError, match="expected shares from 0 to 1"):
        read_question(image, "What is it?", "box:3,4,20,21", normalized=True)


@pytest.mark.parametrize("region", ["point:5,20", "box:0,0,14,40", "scribble:2,5 6,30", "file", "array"])
def test_region_is_in_the_prompt(predictor, folder, region):
    mask = folder / "masks" / "left-ct_00--a.png"
    region = {"file": str(mask), "array": np.asarray(Image.open(mask)) > 0}.get(region, region)
    picture, prompt = predictor.prompt(read_question(folder / "images" / "ct_00--a.png", "What is it?", region))
    assert picture.shape == (40, 30, 3) and prompt.mask_size.tolist() == [[40, 30]]
    points = prompt.region_points[0, 0][prompt.region_point_valid[0, 0]]
    assert len(points) and (points[:, 0] < 0.5).all()  # the left half
    assert (prompt.feature_index == 4).sum() == 1  # behind the image's four patches


def test_files_pictures_and_arrays_are_the_same(predictor, folder):
    path = folder / "images" / "ct_00--a.png"
    opened = Image.open(path)
    _, expected = predictor.prompt(read_question(str(path), "What is it?"))
    for image in (path, opened, np.asarray(opened)):
        chex.assert_trees_all_equal(predictor.prompt(read_question(image, "What is it?"))[1], expected)
    grey = np.asarray(opened.convert("L"))
    np.testing.assert_array_equal(
        predictor.prompt(read_question(grey, "What is it?"))[0], np.repeat(grey[..., None], 3, 2)
    )
    for wrong in (grey / 255, np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8 \[h, w\] or \[h, w, 3\], found"):
            read_question(wrong, "What is it?")


def test_a_new_picture_size_compiles_nothing(predictor, workdir, tmp_path, monkeypatch):
    say(monkeypatch, tiny.make_tokenizer(tmp_path / "tokenizer").seg_id)
    asked = predict.Predictor(workdir)
    asked(np.full((40, 30), 9, np.uint8), "Where is it?")
    count = Compilations()
    for size in ((41, 17), (700, 90)):
        found = asked(np.full(size, 9, np.uint8), "Where is it?")
        assert found.masks and found.masks[0].shape == size
    assert count.requested == 0


def test_no_region_no_slot(predictor, folder):
    _, prompt = predictor.prompt(read_question(folder / "images" / "ct_00--a.png", "<image>\nWhat is it?"))
    assert prompt.region_points.shape[1] == 0 and prompt.feature_index.max() == 3


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ("point:300,2", r"outside the picture.*expected x in \[0, 30\], y in \[0, 40\]"),
        ("box:-5,3,20,20", r"outside the picture"),
        ("box:1,2", "region cannot be read"),
        ("/lost/mask.png", "/lost/mask.png: file is missing"),
        ("masks/right-mr_00--b.png", "mask and picture differ in size.*expected 40 x 30"),
        (np.zeros((40, 30)), "region is empty"),
    ],
)
def test_bad_region_is_named(folder, region, message):
    region = str(folder / region) if isinstance(region, str) and region.startswith("masks") else region
    with pytest.raises(DataError, match=message):
        read_question(folder / "images" / "ct_00--a.png", "What is it?", region)


def example(folder, name="mr_00--b.png"):
    return folder / "images" / name, folder / "masks" / f"left-{name}"


def test_examples_come_before_the_picture(predictor, folder):
    """The tiny model has 4 patches a picture."""
    image, (shown, mask) = folder / "images" / "ct_00--a.png", example(folder)
    arrays = np.asarray(Image.open(shown)), np.asarray(Image.open(mask)) > 0
    picture, prompt = predictor.prompt(read_question(image, "", examples=[(shown, mask), arrays]))
    assert picture.shape == (40, 30, 3) and prompt.clip_pixels.shape[1] == 3
    assert prompt.feature_index[prompt.feature_index >= 0].tolist() == list(range(12))
    np.testing.assert_array_equal(prompt.clip_pixels[0, 0], prompt.clip_pixels[0, 1])
    plain = predictor.prompt(read_question(shown, "Where?"))[1].clip_pixels[0, 0]
    blue = np.argwhere((prompt.clip_pixels[0, 0] != plain).any(-1))
    assert blue[:, 1].max() <= 16, "the left half is painted, and what resizing blends into it"
    _, alone = predictor.prompt(read_question(image, "Where?"))
    np.testing.assert_array_equal(prompt.clip_pixels[0, 2], alone.clip_pixels[0, 0])
    np.testing.assert_array_equal(prompt.sam_pixels, alone.sam_pixels)


def test_a_question_of_ones_own_stands_behind_the_examples(predictor, folder):
    words = [
        predictor.prompt(read_question(folder / "images" / "ct_00--a.png", text, examples=[example(folder)]))[1]
        for text in ("", "It?")
    ]
    assert words[0].valid.sum() > words[1].valid.sum()
    assert (words[0].feature_index >= 0).sum() == (words[1].feature_index >= 0).sum() == 8


def test_examples_that_cannot_be_shown_are_named(predictor, folder):
    image, (shown, mask) = folder / "images" / "ct_00--a.png", example(folder)
    with pytest.raises(ValueError, match="4 examples: expected at most 3"):
        predictor.prompt(read_question(image, "", examples=[(shown, mask)] * 4))
    with pytest.raises(DataError, match="mask and picture differ in size.*expected 24 x 48"):
        predictor.prompt(read_question(image, "", examples=[(shown, example(folder, "ct_00--a.png")[1])]))
    with pytest.raises(DataError, match="mask of an example is empty"):
        predictor.prompt(read_question(image, "", examples=[(shown, np.zeros((24, 48)))]))


@pytest.fixture
def call(folder, workdir, tmp_path, monkeypatch):
    """Runs the command line with these arguments behind the usual ones."""
    usual = ["--checkpoint", workdir, "--image", folder / "images" / "mr_00--b.png", "--question", "Where is it?"]
    usual += ["--out", tmp_path / "out", "--max-new-tokens", "1", "--mask-threshold", "0.0001"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, [*usual, *arguments])])
        predict.main()

    return run


def say(monkeypatch, token):
    monkeypatch.setattr(decode, "draw_token", lambda logits, *_: jnp.full(logits.shape[:1], token, jnp.int32))


def test_command_line_writes_masks_of_the_pictures_size(call, workdir, tmp_path, monkeypatch, capsys):
    tokenizer = tiny.make_tokenizer(tmp_path / "tokenizer")
    say(monkeypatch, tokenizer.seg_id)
    call()
    assert capsys.readouterr().out == "<SEG>\n"
    mask, shown = (np.asarray(Image.open(tmp_path / "out" / name)) for name in ("mask_0.png", "overlay.png"))
    assert mask.shape == (24, 48) and (mask == 255).all() and shown.shape == (24, 48, 3)
    assert (shown[0] == [0, 114, 178]).all()  # the mask's outline

    for name in ("mask_of_mine.png", "boxes.json"):
        (tmp_path / "out" / name).touch()
    say(monkeypatch, tokenizer.eos_id)
    call("--checkpoint", workdir / "checkpoints" / "3")  # a step, and an answer without a mask
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"overlay.png", "mask_of_mine.png"}


def test_command_line_says_that_an_answer_was_cut_off(call, tmp_path, monkeypatch, capsys):
    tokenizer = tiny.make_tokenizer(tmp_path / "tokenizer")
    for token, said in ((tokenizer.seg_id, True), (tokenizer.eos_id, False)):
        say(monkeypatch, token)
        call("--max-new-tokens", "2")
        assert ("the answer was cut off" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "/lost.png"], "/lost.png: file is missing"),
        (["--temperature", "-1"], "temperature -1"),
        (["--checkpoint", "/lost"], "/lost: expected a workdir"),
        (["--question", b"Where \xff?".decode(errors="surrogateescape")], "expected some text in UTF-8"),
        (["--box", "-5,3,20,20"], "region is outside the picture"),
        (["--out", "/proc/answer"], "/proc/answer"),
        (["--example", "/lost.png=/mask.png"], "/lost.png: file is missing"),
        (["--examples", "/lost", "--structure", "liver"], "/lost: not an index of pictures"),
    ],
)
def test_command_line_says_what_is_wrong_before_it_loads_the_model(call, monkeypatch, arguments, message):
    monkeypatch.setattr(predict, "Predictor", None)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--example", "a.png"], "example without a mask: expected IMAGE=MASK, found 'a.png'"),
        (["--example", "a.png=b.png", "--examples", "index"], "expected --example or --examples, found both"),
        (["--examples", "index"], "--examples needs --structure"),
        (["--examples", "index", "--structure", "liver", "--top-k", "4"], "--top-k 4: expected 1 to 3"),
    ],
)
def test_options_of_examples_that_do_not_go_together(call, capsys, arguments, message):
    with pytest.raises(SystemExit):
        call(*arguments)
    assert message in capsys.readouterr().err


def test_an_index_finds_the_examples(call, folder, workdir, tmp_path, monkeypatch, capsys):
    """The query is in the index itself, and not among its own examples."""
    pairs = tmp_path / "pairs"
    for number, name in enumerate(("ct_00--a", "mr_00--b")):
        (pairs / "images").mkdir(parents=True, exist_ok=True)
        (pairs / "masks" / name).mkdir(parents=True)
        shutil.copy(folder / "images" / f"{name}.png", pairs / "images")
        shutil.copy(folder / "masks" / f"left-{name}.png", pairs / "masks" / name / ("lung.png", "lung.png")[number])
    build(library_of_pairs(str(pairs)), str(tmp_path / "index"), str(workdir))
    say(monkeypatch, tiny.make_tokenizer(tmp_path / "tokenizer").seg_id)
    call("--examples", tmp_path / "index", "--structure", "lung")
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("example: ")]
    assert len(shown) == 1 and "ct_00--a.png (cosine " in shown[0]
    with pytest.raises(SystemExit, match="no mask of this structure; expected lung, found 'liver'"):
        call("--examples", tmp_path / "index", "--structure", "liver")


def test_answers_belong_to_what_a_checkpoint_holds(tmp_path):
    tiny.write_checkpoint(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    identity = Predictor(tmp_path / "run").identity
    assert Predictor(tmp_path / "copy" / "checkpoints" / "3").identity == identity
    shutil.rmtree(tmp_path / "run")
    tiny.write_checkpoint(tmp_path / "run", seed=1)
    assert Predictor(tmp_path / "run").identity != identity


def test_asking_reads_no_code_of_reports_and_datasets():
    """So that it starts fast and says nothing of its own."""
    program = "import sys, medplib_jax.predict; print(sorted({name.split('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "tensorflow_datasets", "jinja2", "nltk", "contourpy"} & set(
        ast.literal_eval(found.stdout)
    )
    assert found.stderr == ""


def test_a_question_may_be_longer_than_in_training(predictor, folder):
    question = "Where is the lung? " * 16
    _, prompt = predictor.prompt(read_question(folder / "images" / "ct_00--a.png", question))
    assert 240 < prompt.valid.sum() <= prompt.tokens.shape[1] <= 508
    with pytest.raises(DataError, match="too long"):
        predictor.prompt(read_question(folder / "images" / "ct_00--a.png", question * 5))


def test_a_chat_keeps_the_conversation(call, tmp_path, monkeypatch, capsys):
    asked = []
    prompt = Predictor.prompt
    monkeypatch.setattr(Predictor, "prompt", lambda self, turn: asked.append(turn.record.turns) or prompt(self, turn))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is {a} larger?\n\nWhat is <region>?\nWhat organ?\n"))
    call("--chat", "--region", "a=box:1,1,20,20", "--max-new-tokens", "2")
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3 and "has 1 <region>" in printed.err
    region = "<region>box:1,1,20,20</region>"
    first = ("human", f"<image>\nWhere is it? {region}")
    assert asked[0] == (first,)
    assert asked[1][0] == first and asked[1][1][0] == "gpt" and asked[1][2] == ("human", f"Is {region} larger?")
    assert len(asked[2]) == 5 and asked[2][4] == ("human", "What organ?")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["turn_0", "turn_1", "turn_3"]


@pytest.mark.parametrize(
    "arguments", [["--region", "box:1,2,3,4"], ["--region", "a=point:1,1", "--region", "a=point:2,2"]]
)
def test_regions_without_a_name_of_their_own_are_refused(call, monkeypatch, arguments):
    monkeypatch.setattr(predict, "Predictor", None)
    with pytest.raises(SystemExit, match="expected NAME=SHAPE"):
        call(*arguments)


@pytest.mark.parametrize("what", [["--structures", "x", "--image"], ["--question", "x", "--jobs"]])
def test_of_scans_and_jobs_the_folder_is_checked_before_the_model(folder, tmp_path, monkeypatch, what):
    monkeypatch.setattr(predict, "Predictor", None)
    (tmp_path / "scan.nii").write_bytes(b"")
    given = tmp_path / "scan.nii" if "--image" in what else folder / "images"
    monkeypatch.setattr(sys, "argv", ["predict", "--checkpoint", "c", *what, str(given), "--out", "/proc/answer"])
    with pytest.raises(SystemExit, match="error: .*/proc/answer"):
        predict.main()


@pytest.mark.parametrize("job, found", [({"question": "What is it?"}, "/proc/answer"), ({}, "job without a question")])
def test_jobs_may_have_all_questions_of_their_own(folder, tmp_path, monkeypatch, job, found):
    monkeypatch.setattr(predict, "Predictor", None)
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"image": str(folder / "images" / "ct_00--a.png"), **job}))
    given = ["--checkpoint", "c", "--jobs", str(tmp_path / "jobs.jsonl"), "--out", "/proc/answer"]
    monkeypatch.setattr(sys, "argv", ["predict", *given])
    with pytest.raises(SystemExit, match=f"error: .*{found}"):
        predict.main()
