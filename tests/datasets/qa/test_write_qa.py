"""Questions from sentences about a folder: what is written, that it is true, and that nothing bad goes unnamed."""

import json
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import MASK
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.datasets import write_qa
from medplib_jax.datasets.audit.collect import audit
from medplib_jax.datasets.files import Folder, files_below
from medplib_jax.datasets.qa import grid, grit
from medplib_jax.datasets.qa.folder import read_facts, scan
from medplib_jax.datasets.qa.records import KINDS, Turn, leaks
from medplib_jax.evaluate.metrics import parse_boxes
from tests.datasets.qa.folders import SHAPES, SIZE, make_pairs


def run(pairs, out, **options):
    options = write_qa.QaOptions(**{"test_share": 0.5} | options)
    return write_qa.write_qa(pairs, str(out), write_qa.TemplateWriter(options.seed), options)


def files(out) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def records(out, kind):
    files = [out / split / f"{kind}.json" for split in ("train", "test")]
    return [record for file in files if file.exists() for record in MecovqaSource(str(file), str(out))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    return folder / "out", run(make_pairs(folder / "pairs", 12), folder / "out")


def test_every_kind_is_written_and_found_clean(made):
    out, manifest = made
    assert (
        manifest["images"] == 12
        and manifest["masks"] == 48
        and manifest["skipped"] == 0
        and manifest["writer"] == "template"
    )
    assert all(any(manifest["records"].get(f"{split}/{kind}.json") for split in ("train", "test")) for kind in KINDS)
    assert sum(count for name, count in manifest["records"].items() if name.endswith("/VG.json")) == 36
    report, _ = audit(str(out))
    assert report["records"] == report["usable"] and report["finding_counts"] == {}


def test_records_say_what_they_are_about(made):
    found = [record for record in records(made[0], "grounding") if record.structure]
    assert found and all(record.structure in record.turns[0][1] for record in found)
    assert all(record.structure in record.turns[1][1] for record in records(made[0], "region") if record.structure)
    assert not [record for record in records(made[0], "grounding_pairs") if record.structure]


def test_the_same_seed_gives_the_same_files(made, tmp_path):
    pairs = make_pairs(tmp_path / "pairs", 12)
    run(pairs, tmp_path / "same")
    run(pairs, tmp_path / "other", seed=1)
    first = files(made[0])
    assert files(tmp_path / "same") == first != files(tmp_path / "other")


def test_another_split_leaves_nothing_of_the_first(tmp_path):
    pairs = make_pairs(tmp_path / "pairs", 4)
    run(pairs, tmp_path / "out", test_share=1.0)
    run(pairs, tmp_path / "out", test_share=0.0)
    assert not list((tmp_path / "out").rglob("test/*.json"))


def test_slices_of_a_patient_stay_in_one_split(tmp_path):
    pairs = pathlib.Path(make_pairs(tmp_path / "pairs", 1))
    for number in range(8):
        Image.new("L", SIZE[::-1], number).save(pairs / "images" / f"ct_00--A--case_9--x_{number}.png")
    run(str(pairs), tmp_path / "out")
    splits = {path.parent.name for path in (tmp_path / "out").rglob("vqa.json") if "case_9" in path.read_text()}
    assert len(splits) == 1


def test_metadata_may_name_the_patient(tmp_path):
    pairs = pathlib.Path(make_pairs(tmp_path / "pairs", 12))
    (pairs / "metadata.json").write_text(
        json.dumps({f"ct_00--A--case_{number}--x_1": {"patient": "17"} for number in range(12)})
    )
    manifest = run(str(pairs), tmp_path / "out")
    assert len({name.split("/")[0] for name in manifest["records"] if not name.startswith("grit")}) == 1


def test_every_instance_has_its_box_and_the_answer_its_union(made):
    out, _ = made
    paths = list((out / "grit").rglob("VG.json"))
    assert paths
    for path in paths:
        for record in json.loads(path.read_text()):
            ((question, answer),) = record["conversations"]
            assert question.startswith("Picture 1: <img>images/ct_00--") and len(parse_boxes(answer)) == (
                2 if "cyst" in answer else 1
            )
    cysts = [record for record in records(out, "grounding") if "the cyst" in record.turns[0][1]]
    assert len(cysts) == 12
    for record in cysts:
        mask = images.load_mask(record.path(MASK.findall(record.turns[1][1])[0]), SIZE)
        assert mask.sum() == 2 * 4 * 4  # both instances


def from_grid(box, size):
    """The pixel box, not rounded; the grid's last line is the picture's border."""
    height, width = size
    return [
        (1.0 if value == grid.CELLS - 1 else value / grid.CELLS) * length
        for value, length in zip(box, (width, height) * 2, strict=True)
    ]


def test_boxes_lie_around_their_masks(made, tmp_path):
    out, _ = made
    found = [record for path in (out / "grit").rglob("VG.json") for record in json.loads(path.read_text())]
    (record,) = [record for record in found if record["id"].startswith("ct_00--A--case_0-") and "liver" in str(record)]
    (box,) = parse_boxes(record["conversations"][0][1])
    top, left, bottom, right = SHAPES["liver"]
    np.testing.assert_allclose(from_grid(box, SIZE), (left, top, right, bottom), atol=0.02)


def test_complete_masks_prove_absence(tmp_path):
    pairs = pathlib.Path(make_pairs(tmp_path / "pairs", 2))
    (pairs / "masks/ct_00--A--case_1--x_1/liver.png").unlink()
    run(str(pairs), tmp_path / "unknown")
    run(str(pairs), tmp_path / "complete", complete=True)
    assert not [record for record in records(tmp_path / "unknown", "grounding") if "not visible" in record.turns[1][1]]
    (absent,) = [
        record for record in records(tmp_path / "complete", "grounding") if "not visible" in record.turns[1][1]
    ]
    assert "liver" in absent.turns[1][1] and "case_1" in absent.images[0] and not MASK.search(absent.turns[1][1])


def test_what_cannot_be_used_is_named(tmp_path):
    pairs = pathlib.Path(make_pairs(tmp_path / "pairs", 3))
    masks = pairs / "masks/ct_00--A--case_0--x_1"
    Image.new("L", SIZE[::-1]).save(masks / "spleen.png")
    Image.new("L", (5, 5), 255).save(masks / "aorta.png")
    Image.new("L", SIZE[::-1], 255).save(masks / "a<b>.png")
    (pairs / "images/ct_00--A--case_1--x_1.png").write_bytes(b"no picture")
    Image.new("L", SIZE[::-1]).save(pairs / "images/ct_00--A--case_2--x_1.jpg")
    manifest = run(str(pairs), tmp_path / "out")
    reasons = (
        "mask is empty",
        "mask and picture differ in size",
        "mask name cannot be used",
        "picture cannot be read",
        "image name is not unique",
    )
    assert manifest["reasons"] == dict.fromkeys(reasons, 1) and manifest["images"] == 2
    named = {
        pathlib.Path(json.loads(line)["file"]).name
        for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    }
    assert named == {"spleen.png", "aorta.png", "a<b>.png", "ct_00--A--case_1--x_1.png", "ct_00--A--case_2--x_1.png"}


def test_links_out_of_the_folder_are_refused(tmp_path):
    pairs = pathlib.Path(make_pairs(tmp_path / "pairs", 1))
    Image.new("L", SIZE[::-1], 255).save(tmp_path / "secret.png")
    (pairs / "masks/ct_00--A--case_0--x_1/spleen.png").symlink_to(tmp_path / "secret.png")
    assert run(str(pairs), tmp_path / "out")["reasons"] == {"path leaves the data folder": 1}


def test_an_image_of_which_nothing_is_known_is_named(tmp_path):
    (tmp_path / "pairs/images").mkdir(parents=True)
    Image.new("L", SIZE).save(tmp_path / "pairs/images/a.png")
    assert run(str(tmp_path / "pairs"), tmp_path / "out")["reasons"] == {"nothing to ask about": 1}


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 3}'])
def test_metadata_of_another_form_is_refused(tmp_path, content):
    pairs = pathlib.Path(make_pairs(tmp_path / "pairs", 1))
    (pairs / "metadata.json").write_text(content)
    with pytest.raises(DataError, match="metadata"):
        run(str(pairs), tmp_path / "out")


def test_the_command_names_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["write_qa", "--pairs", str(tmp_path), "--out", str(tmp_path / "out")])
    assert write_qa.main() == 1 and "no images" in capsys.readouterr().err


@given(st.integers(1, 3000), st.integers(1, 3000), st.data())
def test_a_grid_box_lies_at_its_pixels(height, width, data):
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (x0, y0, data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height)))
    cells = grid.to_grid(box, (height, width))
    assert all(0 <= cell <= 999 for cell in cells) and cells[0] < cells[2] and cells[1] < cells[3]
    assert parse_boxes(grid.box_text(cells)).tolist() == [list(cells)]
    np.testing.assert_array_less(
        np.abs(np.subtract(from_grid(cells, (height, width)), box)) / (width, height, width, height), 0.0021
    )


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (Turn("vqa", "Is the liver large?", "liver"), True),
        (Turn("vqa", "Is it the delivery?", "liver"), False),
        (Turn("vqa", "Is it left or right?", "left", ("left", "right")), False),
        (Turn("vqa", "Is it left?", "left", ("left", "right")), True),
        (Turn("region", "What is <region>masks/liver.png</region>?", "liver"), False),
        (Turn("grounding", "Segment the liver.", "The liver"), False),
    ],
)
def test_leaks(turn, expected):
    assert leaks(turn) == expected


def test_many_instances_share_a_box(tmp_path):
    shapes = {f"nodule{f'_{number:03d}' if number else ''}": (2 * number, 3, 2 * number + 1, 4) for number in range(8)}
    (one,) = (
        read_facts(pair, Folder(str(tmp_path / "out"), "test"))[0]
        for pair in scan(make_pairs(tmp_path / "pairs", 1, shapes))[0]
    )
    (target,) = one.targets
    assert len(target.boxes) == 8 and grit.boxes(target) == (target.box,) and target.box == (3, 0, 4, 15)


def skipped(out) -> list[dict]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def test_every_file_and_entry_is_used_or_named(tmp_path):
    pairs = pathlib.Path(make_pairs(tmp_path / "pairs", 2))
    name = "ct_00--A--case_0--x_1"
    known = set(files_below(str(pairs)))
    lost = (
        *(
            "masks/x.png",
            f"masks/{name.upper()}/liver.png",
            f"masks/{name}_segmentation.png",
            f"masks/{name}/more/a.png",
        ),
        *("imagesTr/a.png", f"masks/{name}.png", f"masks/{name}/notes.txt", "images/readme.md"),
    )
    for file in lost:
        (pairs / file).parent.mkdir(exist_ok=True)
        Image.new("L", SIZE[::-1], 255).save(pairs / file, "PNG")
    (pairs / "masks/.DS_Store").touch()
    notes = json.loads((pairs / "metadata.json").read_text())
    (pairs / "metadata.json").write_text("\ufeff" + json.dumps({**notes, "other": {}, name.upper(): {}}), "utf-8")
    run(str(pairs), tmp_path / "out")
    named = [line for line in skipped(tmp_path / "out") if line["what"] != "metadata of no image"]
    assert {str(pathlib.Path(line["file"]).relative_to(pairs)) for line in named} == set(lost)
    assert {line["found"] for line in skipped(tmp_path / "out")} >= {"other", name.upper()}
    assert set(files_below(str(pairs))) == known | set(lost)


def test_no_record_is_made_twice(tmp_path):
    shapes = {name: (2 * number, 2, 2 * number + 2, 9) for number, name in enumerate("abcdefghij")}
    run(make_pairs(tmp_path / "pairs", 40, shapes), tmp_path / "out")
    for path in [*(tmp_path / "out").rglob("t*/*.json")]:
        texts = [json.dumps(record) for record in json.loads(path.read_text())]
        assert len(texts) == len(set(texts)), path


def test_an_empty_split_is_said(tmp_path, monkeypatch, capsys):
    pairs = make_pairs(tmp_path / "pairs", 2)
    monkeypatch.setattr(
        sys, "argv", ["write_qa", "--pairs", pairs, "--out", str(tmp_path / "out"), "--test-share", "1e-9"]
    )
    assert write_qa.main() == 0
    assert "no test split: none of 2 patients" in capsys.readouterr().err
    assert not run(make_pairs(tmp_path / "many", 12), tmp_path / "many_out")["notices"]


def test_images_of_a_folder_or_of_a_pattern_are_one_patient(tmp_path):
    for number in range(12):
        path = tmp_path / f"pairs/images/p{number % 2}/x-{number % 3}-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", SIZE[::-1], number).save(path)
    notes = {f"p{number % 2}/x-{number % 3}-{number}": {"modality": "CT"} for number in range(12)}
    (tmp_path / "pairs/metadata.json").write_text(json.dumps(notes))
    assert run(str(tmp_path / "pairs"), tmp_path / "out")["patients"] == 2
    assert run(str(tmp_path / "pairs"), tmp_path / "out", patient=r"x-(\d)")["patients"] == 3


def test_a_label_map_is_a_mask_for_each_value(tmp_path):
    pairs = pathlib.Path(make_pairs(tmp_path / "pairs", 2, {}))
    values = np.zeros(SIZE, np.uint8)
    values[2:9, 2:9], values[12:20, 4:20], values[0, 0] = 1, 13, 7
    Image.fromarray(values).save(pairs / "masks/ct_00--A--case_0--x_1.png")
    (pairs / "labels.json").write_text(json.dumps({"1": "liver", "13": "left kidney", "2": "spleen"}))
    manifest = run(str(pairs), tmp_path / "out", complete=True)
    assert manifest["masks"] == 2 and manifest["reasons"]["value without a name"] == 1
    found = {
        name: np.asarray(Image.open(path))
        for name in ("liver", "left_kidney")
        for path in (tmp_path / "out").rglob(f"*0--x_1--{name}.png")
    }
    np.testing.assert_array_equal(found["liver"], (values == 1) * 255)
    np.testing.assert_array_equal(found["left_kidney"], (values == 13) * 255)
    absent = {
        record.turns[0][1] for record in records(tmp_path / "out", "grounding") if "not visible" in record.turns[1][1]
    }
    assert absent and not any("liver" in text and "case_0" in text for text in absent)


def test_a_picture_of_twelve_bits_is_noted_and_shown_in_a_window(tmp_path):
    pairs = pathlib.Path(make_pairs(tmp_path / "pairs", 1))
    values = np.linspace(0, 4095, SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint16)
    Image.fromarray(values).save(pairs / "images/ct_00--A--case_0--x_1.png")
    manifest = run(str(pairs), tmp_path / "out")
    assert any("keeps 16 levels of grey" in notice for notice in manifest["notices"])
    manifest = run(str(pairs), tmp_path / "out", window=(2048, 4096))
    assert not any("levels" in notice for notice in manifest["notices"])
    shown = np.asarray(Image.open(tmp_path / "out/images/ct_00--A--case_0--x_1.png"))
    assert shown.dtype == np.uint8 and shown.min() == 0 and shown.max() == 255 and manifest["masks"] == 4
