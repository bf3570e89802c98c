"""Every builder, run again after its source, an option or its code changed, makes what it makes in an empty folder."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from medplib_jax.data.errors import DataError
from medplib_jax.datasets import import_dataset, sa_med2d, slices, write_qa
from medplib_jax.datasets.assemble import dataset as assemble
from medplib_jax.datasets.assemble import records as assemble_records
from medplib_jax.datasets.processes import HERE
from medplib_jax.datasets.qa import folder as qa_folder
from medplib_jax.datasets.qa import template
from tests.datasets import collection
from tests.datasets.qa.folders import make_pairs
from tests.datasets.test_importers import slake
from tests.datasets.test_slices import write_nifti


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    """Content by name; the folder's own path in it does not count."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"OUT") for path in files}


def rewrite(path: pathlib.Path, change) -> None:
    """The file with other content of the same length and age, as far as its content allows."""
    status, content = path.stat(), change(path.read_bytes())
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def upside_down(path: pathlib.Path) -> None:
    pixels = np.asarray(Image.open(path))[::-1].copy()
    kind = Image.open(path).format
    rewrite(path, lambda _: b"")
    Image.fromarray(pixels).save(path, kind)


class Slices:
    picture, mask, metadata = "images/p1/a.nii.gz", "masks/p1/a/liver.nii.gz", "labels.json"

    def make(self, root):
        values = np.random.default_rng(0).integers(0, 400, (8, 9, 3)).astype(np.int16)
        write_nifti(root / self.picture, values)
        write_nifti(root / self.mask, (values > 150).astype(np.uint8) + (values > 300))
        (root / self.metadata).write_text('{"liver": 1}')

    def run(self, root, out, changed=False):
        slices.make_slices(str(root), str(out), slices.SliceOptions("CT", window="100,50" if changed else ""))

    def change_picture(self, root):
        write_nifti(root / self.picture, np.random.default_rng(1).integers(0, 400, (8, 9, 3)).astype(np.int16))

    def change_mask(self, root):
        write_nifti(root / self.mask, np.pad(np.ones((2, 2, 1), np.uint8), ((0, 6), (0, 7), (0, 2))))

    def change_metadata(self, root):
        (root / self.metadata).write_text('{"lungs": 1, "cyst": 2}')

    def change_code(self, monkeypatch):
        real = slices.pictures
        monkeypatch.setattr(slices, "pictures", lambda volume, plane, windows: real(volume, "coronal", windows))


class WriteQa:
    def make(self, root):
        make_pairs(root, 4)

    def run(self, root, out, changed=False):
        writer = write_qa.TemplateWriter(1 if changed else 0)
        write_qa.write_qa(str(root), str(out), writer, write_qa.QaOptions(test_share=0.3 if changed else 0.6))

    def change_picture(self, root):
        upside_down(root / "images/ct_00--A--case_0--x_1.png")

    def change_mask(self, root):
        upside_down(root / "masks/ct_00--A--case_0--x_1/cyst_001.png")

    def change_metadata(self, root):
        (root / "metadata.json").write_text('{"ct_00--A--case_0--x_1": {"patient": "17"}}')

    def change_code(self, monkeypatch):
        monkeypatch.setattr(template, "verb", lambda name: "may be")
        monkeypatch.setattr(qa_folder, "safe_name", lambda name: f"other-{name.replace('/', '-').replace(' ', '_')}")


class ImportDataset:
    def make(self, root):
        slake(root)

    def run(self, root, out, changed=False):
        import_dataset.import_dataset("slake" if changed else "slake_en", str(root), str(out))

    def change_picture(self, root):
        upside_down(root / "imgs/xmlab1/source.jpg")

    def change_metadata(self, root):
        (root / "train.json").write_text((root / "train.json").read_text().replace("CT", "MRI"))

    def change_code(self, monkeypatch):
        monkeypatch.setattr(import_dataset, "image_reference", lambda name, modality: "images/other.jpg")


class SaMed2d:
    name = collection.CT.format(0, 0)

    def make(self, root):
        source = collection.make_images(root.parent / "made") / "SAMed2Dv1"
        shutil.move(source, root)

    def run(self, root, out, changed=False):
        sa_med2d.make_pairs(str(root), str(out), "*case_[12]*" if changed else "*case_[01]*")

    def change_picture(self, root):
        upside_down(root / f"images/{self.name}.png")

    def change_mask(self, root):
        upside_down(root / f"masks/{self.name}--0001_000.png")

    def change_metadata(self, root):
        (root / "SAMed2D_v1_class_mapping_id.json").write_text('{"ORGANS": {"spleen": 1, "left_kidney": 2}}')

    def change_code(self, monkeypatch):
        monkeypatch.setattr(sa_med2d, "safe_name", lambda name: f"other-{name.replace(' ', '_')}")


class Assemble(SaMed2d):
    def make(self, root):
        super().make(root)
        collection.make_annotations(root / "annotations")

    def run(self, root, out, changed=False):
        if changed:  # another set of files is another source
            (root / "annotations/train/MeCoVQA-Grounding.json").unlink(missing_ok=True)
        assemble.assemble(str(root / "annotations"), str(root), str(out), HERE)

    def change_code(self, monkeypatch):
        monkeypatch.setattr(assemble, "code_version", lambda: "another")
        monkeypatch.setattr(assemble_records, "class_name", lambda name, names: "another")


BUILDERS = (Slices, WriteQa, ImportDataset, SaMed2d, Assemble)
CHANGES = ("nothing", "picture", "mask", "metadata", "option", "code", "fewer files")


def changed(builder, what, root, monkeypatch) -> None:
    if what == "code":
        builder.change_code(monkeypatch)
    elif what == "fewer files":
        for path in [found for name in ("*case_0*", "a.nii.gz", "validate.json") for found in root.rglob(name)]:
            if path.is_file():
                path.unlink()
    elif what not in ("nothing", "option"):
        getattr(builder, f"change_{what}", lambda root: None)(root)


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("builder", [one() for one in BUILDERS], ids=lambda builder: type(builder).__name__)
def test_a_second_run_equals_a_run_into_an_empty_folder_or_is_refused(tmp_path, monkeypatch, builder, what):
    root, out, new = tmp_path / "source", tmp_path / "out", tmp_path / "new"
    builder.make(root)
    builder.run(root, out)
    first = tree(out)
    changed(builder, what, root, monkeypatch)
    try:
        builder.run(root, out, what == "option")
    except DataError as error:
        refused = str(error)
        assert what in ("fewer files", "option") and str(tmp_path) in refused
        return
    builder.run(root, new, what == "option")
    assert tree(out) == tree(new)
    supported = what in ("option", "code", "fewer files") or hasattr(builder, f"change_{what}")
    assert (tree(out) == first) == (what == "nothing" or not supported)


@pytest.mark.parametrize("builder", [WriteQa(), ImportDataset()], ids=lambda builder: type(builder).__name__)
def test_the_output_may_lie_in_the_source(tmp_path, builder):
    root = tmp_path / "source"
    builder.make(root)
    builder.run(root, root / "out")
    first = tree(root / "out")
    builder.run(root, root / "out")
    assert tree(root / "out") == first


def test_an_interrupted_assembly_goes_on_where_it_was(tmp_path, monkeypatch):
    builder, root, out = Assemble(), tmp_path / "source", tmp_path / "out"
    builder.make(root)
    builder.run(root, out)
    built = []
    monkeypatch.setattr(assemble, "build_shard", lambda task: built.append(task.name))
    builder.run(root, out)
    assert not built


def test_two_sources_in_one_folder_are_refused(tmp_path):
    for name in ("ct", "mr"):
        Slices().make(tmp_path / name)
    Slices().run(tmp_path / "ct", tmp_path / "out")
    before = json.loads((tmp_path / "out/metadata.json").read_text())
    with pytest.raises(DataError, match="another command made; expected slices ../mr, found slices ../ct"):
        Slices().run(tmp_path / "mr", tmp_path / "out")
    assert json.loads((tmp_path / "out/metadata.json").read_text()) == before
