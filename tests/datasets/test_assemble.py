"""From published files to a dataset that TFDS and the training read; what is repaired, what is left out, and doing it
again."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
from PIL import Image

from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ClipConfig, MaskConfig, ModelConfig, RegionConfig
from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.pipeline import make_loader
from medplib_jax.data.sources import open_source
from medplib_jax.datasets.assemble import dataset as program
from medplib_jax.datasets.assemble.dataset import assemble
from medplib_jax.datasets.processes import Workers
from tests.datasets import collection
from tests.datasets.collection import CT, grounding, record, rectangle, region, vqa, write
from tests.paths import GOLDEN, ROOT

KILLED = """
import os, psutil, signal, sys
from medplib_jax.datasets.assemble import dataset as assemble
assemble.RECORDS_PER_SHARD = 1
build = assemble._build

def until_the_third(tasks, workers):
    for number, result in enumerate(build(tasks, workers)):
        if number == 3:
            print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        yield result

assemble._build = until_the_third
assemble.assemble(*sys.argv[1:], assemble.Workers(1))
"""


@pytest.fixture
def folders(tmp_path):
    return (
        collection.make_annotations(tmp_path / "MeCoVQA"),
        collection.make_images(tmp_path / "SA-Med2D-20M"),
        tmp_path / "out",
    )


def run(folders, workers=0):
    annotations, pictures, out = map(str, folders)
    return assemble(annotations, pictures, out, Workers(workers))


def problems(out):
    return [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]


def test_published_files_become_configs_and_splits(folders):
    manifest = run(folders, workers=2)
    counts = {name: counts["written"] for name, counts in manifest["splits"].items()}
    assert counts == {
        "grounding/test": 1,
        "complex/train": 2,
        "region/train": 2,
        "grounding/train": 3,
        "zeroshot/mr": 1,
    }
    assert (manifest["records"], manifest["written"], manifest["left_out"]) == (9, 9, {})
    assert "test/MeCoVQA_Region_VQA_test.json" in manifest["annotation_files_absent"]
    assert len(manifest["sources"]) == 5 and all(len(open_source(source)) for source in manifest["sources"])
    assert json.loads((folders[2] / "manifest.json").read_text()) == manifest


def test_tfds_reads_the_dataset_without_tensorflow(folders):
    run(folders)
    code = f"""
import sys, tensorflow_datasets as tfds
example = tfds.data_source("mecovqa/grounding", data_dir={str(folders[2])!r}, split="train")[1]
masks = example["masks"]
print(example["image"].shape, masks[0].shape, masks[0].max(), example["id"].decode(), example["mask_labels"])
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "(24, 32, 3) (24, 32, 1) 255 train/MeCoVQA-Grounding.json#1 [b'liver']"


def test_masks_of_a_class_are_united_and_written(folders):
    run(folders)
    united = np.maximum(rectangle(2, 2, 9, 9), rectangle(12, 2, 20, 8))
    name = f"masks_merged/{CT.format(0, 0)}--0001_merged.png"
    np.testing.assert_array_equal(np.asarray(Image.open(folders[2] / name)), united)
    one = open_source(f"{folders[2]}/mecovqa/grounding/1.0.0#train")[0]
    np.testing.assert_array_equal(images.load_mask(one.find(name), collection.SIZE), united > 0)


def test_the_dataset_equals_its_files(folders):
    annotations, pictures, out = folders
    run(folders)
    assembled = open_source(f"{out}/mecovqa/region/1.0.0")
    published = open_source(str(annotations / "train/MeCoVQA-Complex_local+Region.json"), str(pictures / "SAMed2Dv1"))
    assert len(assembled) == len(published) == 2
    for ours, theirs in zip((assembled[i] for i in range(2)), (published[i] for i in range(2)), strict=True):
        assert (ours.turns, ours.images, ours.answer_type) == (theirs.turns, theirs.images, theirs.answer_type)
        rgb = images.load_image(ours.find(ours.images[0]))
        np.testing.assert_array_equal(rgb, images.load_image(theirs.find(theirs.images[0])))
        mask = f"masks/{CT.format(ours.index, ours.index)}--0002_000.png"
        np.testing.assert_array_equal(
            images.load_mask(ours.find(mask), rgb.shape[:2]), images.load_mask(theirs.find(mask), rgb.shape[:2])
        )


def test_structure_and_volume_are_kept(folders):
    volume = {"name": "ct_1", "slice": 2, "slices": 9, "spacing": [5.0, 0.7, 1.25], "size": [20, 30]}
    write(folders[0], "train/MeCoVQA-Grounding.json", [grounding(0, structure="liver", volume=volume), grounding(1)])
    run(folders)
    first, second = open_source(f"{folders[2]}/mecovqa/grounding/1.0.0#train")
    assert first.structure == "liver" and dataclasses.asdict(first.volume) == {
        **volume,
        "spacing": (5.0, 0.7, 1.25),
        "size": (20, 30),
    }
    assert second.volume is None


def test_the_spacing_of_a_picture_is_kept(folders):
    write(folders[0], "train/MeCoVQA-Grounding.json", [grounding(0, spacing=[0.7, 1.25]), grounding(1)])
    run(folders)
    assembled = open_source(f"{folders[2]}/mecovqa/grounding/1.0.0#train")
    assert [record.spacing for record in assembled] == [(0.7, 1.25), None]


def test_training_reads_the_same_batches_from_both(folders):
    annotations, pictures, out = folders
    run(folders)
    shape = DataConfig(tokenizer=str(GOLDEN / "tokenizer"), bucket_lengths=(128,), batch_size=2, mask_canvas=32)
    model = ModelConfig(
        clip=ClipConfig(image_size=28), mask=MaskConfig(image_size=32), region=RegionConfig(max_points=16)
    )
    names = ("grounding", "train/MeCoVQA-Grounding.json"), ("region", "train/MeCoVQA-Complex_local+Region.json")
    united = out / "masks_merged"
    united.rename(pictures / "SAMed2Dv1" / "masks_merged")
    for config, file in names:
        ours = dataclasses.replace(shape, sources=(f"{out}/mecovqa/{config}/1.0.0#train",))
        theirs = dataclasses.replace(shape, sources=(str(annotations / file),))
        for rows in ([0, 1], [1]):
            found, expected = (
                make_loader(one, model, str(pictures / "SAMed2Dv1")).load_eval([0, 1], rows, False)[0]
                for one in (ours, theirs)
            )
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array, err_msg=name)


NAME = CT.format(0, 0)
REPAIRS = [
    (grounding(0, f"masks_merged/{NAME}--0001_merged"), "missing suffix added"),
    (grounding(0, f"masks_merged/{NAME}--0001.png"), "missing _merged added"),
    (vqa(0) | {"image": f"images/{NAME}"}, "missing suffix added"),
    (vqa(0) | {"image": [f"/root/somebody/SAMed2Dv1/images/{NAME}.png"]}, "absolute path made relative"),
    (vqa(0) | {"image": f" images\\{NAME}.png"}, "path cleaned of spaces and backslashes"),
    (record(0, "Is this CT?", "Yes"), "<image> added to the question"),
]


@pytest.mark.parametrize(("raw", "what"), REPAIRS)
def test_repairs(folders, raw, what):
    write(folders[0], "train/MeCoVQA-Complex.json", [raw])
    assert run(folders)["repaired"] == {what: 1}
    assert {"action": "repaired", "file": "train/MeCoVQA-Complex.json", "record": 0, "what": what} in problems(
        folders[2]
    )
    one = open_source(f"{folders[2]}/mecovqa/complex/1.0.0")[0]
    assert one.images == (f"images/{NAME}.png",) and one.turns[0][1].startswith("<image>")
    assert set(one.contents) <= {one.images[0], f"masks_merged/{NAME}--0001_merged.png"}


LEFT_OUT = [
    ("text", "not a record"),
    ({"image": f"images/{NAME}.png"}, "record without conversations"),
    (record(0, "<image>\nWhat?", ""), "empty answer"),
    (record(0, "<image>\nWhat?", "half \ud800 a pair"), "text is not Unicode"),
    (record(0, "<image>\nSegment.", "It is <SEG>."), "<SEG> and masks do not pair up"),
    ({"conversations": record(0, "What?", "This.")["conversations"]}, "not one image"),
    (vqa(9), "file is missing"),
    (vqa(0) | {"image": "../../../etc/passwd"}, "path leaves the data folder"),
    (vqa(0) | {"image": "images/link.png"}, "path leaves the data folder"),
    (vqa(0) | {"image": "images/broken.png"}, "picture cannot be read"),
    (grounding(0, "masks/empty.png"), "mask is empty"),
    (grounding(0, "masks/small.png"), "mask and picture differ in size"),
    (grounding(0, f"masks_merged/{NAME}--0007_merged.png"), "no instance mask to unite"),
    (grounding(0, "masks_merged/../../../x_merged.png"), "no instance mask to unite"),
]


@pytest.mark.parametrize(("raw", "what"), LEFT_OUT)
def test_what_cannot_be_used_is_left_out_by_name(folders, raw, what):
    root = folders[1] / "SAMed2Dv1"
    os.symlink(folders[0] / "train/MeCoVQA-Complex.json", root / "images" / "link.png")
    (root / "images" / "broken.png").write_bytes(b"\x89PNG\r\n")
    Image.new("L", collection.SIZE[::-1]).save(root / "masks" / "empty.png")
    Image.fromarray(rectangle(1, 1, 3, 3, (8, 8))).save(root / "masks" / "small.png")
    write(folders[0], "train/MeCoVQA-Complex.json", [vqa(0), raw, vqa(1)])
    manifest = run(folders)
    assert manifest["left_out"] == {what: 1}
    assert manifest["splits"]["complex/train"] == {"records": 3, "written": 2, "left_out": 1}
    (problem,) = problems(folders[2])
    assert (problem["action"], problem["file"], problem["record"]) == ("left out", "train/MeCoVQA-Complex.json", 1)
    ids = [open_source(f"{folders[2]}/mecovqa/complex/1.0.0")[i].images[0] for i in range(2)]
    assert ids == [f"images/{CT.format(i, i)}.png" for i in (0, 1)]


def test_missing_images_are_listed_and_taken_in_when_they_come(folders):
    write(folders[0], "train/MeCoVQA-Complex.json", [vqa(case) for case in range(6)])
    manifest = run(folders)
    assert manifest["missing_files"] == 2 and manifest["missing_by_folder"] == {"images/ct_00--ORGANS": 2}
    assert (folders[2] / "missing.txt").read_text().splitlines() == [
        f"images/{CT.format(case, case)}.png" for case in (4, 5)
    ]
    assert "files are missing" in program.describe(manifest, str(folders[2]))
    collection.make_images(folders[1], [4, 5])
    assert run(folders)["missing_files"] == 0
    assert len(open_source(f"{folders[2]}/mecovqa/complex/1.0.0")) == 6


def test_united_masks_that_are_there_are_used_with_or_without_their_suffix(folders):
    given = folders[1] / "SAMed2Dv1/masks_merged"
    given.mkdir()
    name = f"{CT.format(3, 3)}--0007"
    Image.fromarray(rectangle(1, 1, 3, 3)).save(given / f"{name}.png")
    write(folders[0], "test/MeCoVQA_Grounding_test.json", [grounding(3, f"masks_merged/{name}")])
    assert run(folders)["splits"]["grounding/test"]["written"] == 1


def test_an_interrupted_run_continues(folders, monkeypatch):
    monkeypatch.setattr(program, "RECORDS_PER_SHARD", 1)
    built, build = [], program.build_shard

    def build_two(task):
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(task.path)
        return build(task)

    monkeypatch.setattr(program, "build_shard", build_two)
    with pytest.raises(KeyboardInterrupt):
        run(folders)
    rest = []
    monkeypatch.setattr(program, "build_shard", lambda task: rest.append(task.path) or build(task))
    assert run(folders)["written"] == 9
    assert len(rest) == 7 and not set(rest) & set(built)
    rest.clear()
    assert run(folders)["written"] == 9 and rest == []
    assert len(open_source(f"{folders[2]}/mecovqa/grounding/1.0.0#train")) == 3


def test_a_killed_run_continues_and_leaves_no_process(folders, tmp_path):
    """SIGKILL in the middle; the same command then gives what an uninterrupted one gives."""
    write(folders[0], "train/MeCoVQA-Complex.json", [vqa(case % 4) for case in range(60)])
    with open(tmp_path / "pids", "w") as pids:  # not a pipe, which a worker that lives on would hold open
        process = subprocess.run(
            [sys.executable, "-c", KILLED, *map(str, folders)], cwd=ROOT, stdout=pids, stderr=subprocess.DEVNULL
        )
    assert process.returncode == -signal.SIGKILL
    workers = [
        psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split() if psutil.pid_exists(int(pid))
    ]
    assert not [
        worker for worker in psutil.wait_procs(workers, timeout=60)[1] if worker.status() != psutil.STATUS_ZOMBIE
    ]
    assert not (folders[2] / "manifest.json").exists() and len(list((folders[2] / ".shards").glob("*.json"))) < 67
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "RECORDS_PER_SHARD", 1)
        run(folders)
        run((*folders[:2], tmp_path / "whole"))
    assert contents(folders[2]) == contents(tmp_path / "whole") and not list(folders[2].rglob("*.tmp"))


def contents(out) -> dict:
    """Everything that a user reads, by name; paths in the manifest are relative."""
    found = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and ".shards" not in path.parts
    }
    return found | {"manifest.json": found["manifest.json"].replace(str(out).encode(), b"OUT")}


def test_every_json_file_is_read_or_named(folders):
    (folders[0] / "train/MeCoVQA-Complex.json").rename(folders[0] / "train/MeCoVQA-Complex.JSON")
    lines = "\n".join(json.dumps(vqa(case)) for case in range(2))
    (folders[0] / "more.jsonl").write_text("\ufeff" + lines, "utf-8")
    (folders[0] / "notes.json").write_text("{}")
    manifest = run(folders)
    assert manifest["files_of_another_kind"] == ["notes.json"]
    assert manifest["splits"]["complex/train"]["written"] == 4


def test_a_folder_may_have_a_number_sign_in_its_name(folders):
    out = folders[2].with_name("out#1, second")
    manifest = run((*folders[:2], out))
    assert sum(len(open_source(source)) for source in manifest["sources"]) == manifest["written"] == 9
    assert len(open_source(f"{out}/mecovqa/complex/1.0.0")) == 2


def test_the_output_may_lie_among_the_annotations(folders):
    inside = (folders[0], folders[1], folders[0] / "assembled")
    write(folders[0], "train/MeCoVQA-Complex.json", [vqa(0), vqa(9)])
    assert run(inside) == run(inside)
    assert run(inside)["records"] == 9


def test_a_published_file_that_is_broken_is_named(folders):
    (folders[0] / "train/MeCoVQA-Complex.json").write_text("<html>")
    with pytest.raises(DataError, match="MeCoVQA-Complex.json: annotation file cannot be read"):
        run(folders)


def test_a_change_of_the_annotations_is_taken_in(folders):
    run(folders)
    write(folders[0], "train/MeCoVQA-Complex.json", [vqa(2)])
    run(folders)
    assert open_source(f"{folders[2]}/mecovqa/complex/1.0.0")[0].images == (f"images/{CT.format(2, 2)}.png",)


def test_files_with_other_names_are_sorted_by_what_they_hold(tmp_path, folders):
    for name, records in (("a.json", [grounding(0)]), ("b.json", [region(0)]), ("my_test.json", [vqa(0)])):
        write(tmp_path / "own", name, records)
    manifest = run((tmp_path / "own", folders[1], folders[2]))
    assert set(manifest["splits"]) == {"grounding/train", "region/train", "complex/test"}
    assert manifest["annotation_files_absent"] == []


def test_grey_in_three_channels_is_kept_in_one(folders):
    path = folders[1] / "SAMed2Dv1" / "images" / f"{NAME}.png"
    rgb = np.repeat(np.asarray(Image.open(path))[..., None], 3, axis=2)
    Image.fromarray(rgb).save(path)
    assert run(folders)["repaired"] == {}
    one = open_source(f"{folders[2]}/mecovqa/complex/1.0.0")[0]
    np.testing.assert_array_equal(images.load_image(one.find(one.images[0])), rgb)
    assert images.load_pixels(one.find(one.images[0])).ndim == 2


def test_pictures_that_are_not_plain_are_made_so(folders):
    path = folders[1] / "SAMed2Dv1" / "images" / f"{NAME}.png"
    Image.fromarray(np.full(collection.SIZE, 513, np.uint16)).save(path)
    run(folders)
    one = open_source(f"{folders[2]}/mecovqa/complex/1.0.0")[0]
    assert (np.asarray(Image.open(path)) == 513).all()
    assert (images.load_image(one.find(one.images[0])) == 2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda annotations, pictures, out: (annotations, annotations, out),
            "not a folder of images; expected images/ or SAMed2Dv1/images/",
        ),
        (lambda annotations, pictures, out: (out, pictures, out), "no annotation file"),
    ],
)
def test_wrong_folders_are_named(folders, change, message):
    with pytest.raises(DataError, match=message):
        run(change(*folders))


def test_a_folder_without_a_dataset_is_named(tmp_path):
    with pytest.raises(DataError, match="dataset cannot be read; expected FOLDER#SPLIT"):
        open_source(f"{tmp_path}#train")
