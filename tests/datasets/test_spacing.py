"""A picture's spacing on its way from scans and metadata to records."""

import json

import numpy as np
import pytest
from PIL import Image

from medplib_jax.data.errors import DataError
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.datasets.icl import IclOptions, make_icl
from medplib_jax.datasets.slices import SliceOptions, make_slices
from medplib_jax.datasets.write_qa import QaOptions, TemplateWriter, write_qa
from tests.datasets.qa.folders import make_pairs
from tests.volumes.scans import write_dicom, write_nifti


def spacings(folder) -> list:
    return [entry.get("spacing") for entry in json.loads((folder / "metadata.json").read_text()).values()]


def test_slices_tell_the_spacing_of_their_pictures_to_questions_and_examples(tmp_path):
    scan = np.random.default_rng(0).normal(size=(20, 24, 3)).astype(np.float32)
    mask = np.zeros(scan.shape, np.uint8)
    mask[4:12, 6:18] = 1
    for name in "abcd":
        write_nifti(tmp_path / f"s/images/{name}.nii.gz", scan, np.diag([0.8, 0.5, 3, 1]))
        write_nifti(tmp_path / f"s/masks/{name}/liver.nii.gz", mask, np.diag([0.8, 0.5, 3, 1]))
    make_slices(str(tmp_path / "s"), str(tmp_path / "slices"), SliceOptions("MR"))
    height, width = np.asarray(Image.open(next((tmp_path / "slices/images").iterdir()))).shape
    (told,) = {tuple(one) for one in spacings(tmp_path / "slices")}
    assert told == pytest.approx((24 * 0.5 / height, 20 * 0.8 / width), abs=1e-6)  # however it is turned and resized
    write_qa(str(tmp_path / "slices"), str(tmp_path / "qa"), TemplateWriter(0), QaOptions(test_share=0))
    make_icl(str(tmp_path / "slices"), str(tmp_path / "icl"), IclOptions(test_share=0))
    for file in ("qa/train/grounding.json", "icl/train/icl.json"):
        source = MecovqaSource(str(tmp_path / file), str((tmp_path / file).parent.parent))
        assert len(source) and {source[i].spacing for i in range(len(source))} == {told}, file


@pytest.mark.parametrize(
    ("tags", "known"),
    [
        ({"PixelSpacing": [0.7, 0.7]}, True),
        ({"ImagerPixelSpacing": [0.1, 0.1]}, False),  # on the detector, not in the patient
        ({"PixelAspectRatio": [2, 1]}, False),
        ({}, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_dicom_picture_has_a_spacing_if_its_file_says_that_of_the_patient(tmp_path, tags, known):
    write_dicom(tmp_path / "s/images/a.dcm", np.random.default_rng(0).integers(0, 900, (20, 20)), **tags)
    make_slices(str(tmp_path / "s"), str(tmp_path / "out"), SliceOptions())
    assert spacings(tmp_path / "out") == [[0.7, 0.7] if known else None]
    asked = SliceOptions(negatives=True, questions=True)
    if known:
        make_slices(str(tmp_path / "s"), str(tmp_path / "asked"), asked)
        return
    with pytest.raises(DataError, match="volume without lengths; expected a PixelSpacing in mm"):
        make_slices(str(tmp_path / "s"), str(tmp_path / "asked"), asked)


def test_a_spacing_in_the_metadata_that_is_none_is_named(tmp_path):
    pairs = tmp_path / "pairs"
    make_pairs(pairs)
    first, second, third = json.loads((pairs / "metadata.json").read_text())
    told = {first: {"spacing": [0.5, 0.8]}, second: {"spacing": "wide"}, third: {}}
    (pairs / "metadata.json").write_text(json.dumps(told))
    write_qa(str(pairs), str(tmp_path / "out"), TemplateWriter(0), QaOptions(test_share=0))
    source = MecovqaSource(str(tmp_path / "out/train/vqa.json"), str(tmp_path / "out"))
    assert {source[i].spacing for i in range(len(source))} == {(0.5, 0.8), None}
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    (named,) = (line for line in lines if "spacing" in line["what"])
    assert named["what"] == f"spacing cannot be used ({second})" and named["found"] == "'wide'"
