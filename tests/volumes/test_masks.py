"""Masks of a scan out of files of all kinds, and back: NIfTI and DICOM SEG hold what was drawn, voxel for voxel."""

import json

import highdicom as hd
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.dicom import read_header
from medplib_jax.volumes.formats import itk_affine
from medplib_jax.volumes.geometry import PLANES, cut, onto
from medplib_jax.volumes.masks import inside, masks_of, read_dicom_masks, read_label_map, read_labels
from medplib_jax.volumes.read import find_scans, read_scan
from medplib_jax.volumes.volume import Volume
from medplib_jax.volumes.write import concept_of, label_map, write_dicom_seg, write_nifti
from tests.volumes.scans import AXIAL, SAGITTAL, real, some_values, write_series
from tests.volumes.scans import write_nifti as save
from tests.volumes.test_geometry import affines

SHAPE = (5, 6, 7)


def some_masks(seed=0, shape=SHAPE, overlap=False):
    random = np.random.default_rng(seed).random(shape)
    return {"liver": random < 0.3, "liver tumour": random < 0.1 if overlap else random > 0.8, "nothing": random > 2}


def by_slices(masks, scan, plane):
    """Masks cut into pictures and put back, as when a model answers with the truth."""
    way, made = cut(scan, plane), {}
    for name, mask in masks.items():
        made[name] = np.zeros(scan.shape, bool)
        for number in range(len(way)):
            shown = way.mask_on_picture(way.reoriented(mask)[number])
            way.reoriented(made[name])[number] = way.mask_on_plane(shown)
    return made


@given(affine=affines(), plane=st.sampled_from(PLANES), seed=st.integers(0, 99))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_masks_written_to_nifti_are_the_ones_drawn(tmp_path, affine, plane, seed):
    save(tmp_path / "scan.nii.gz", some_values(), affine)
    scan, masks = read_scan(str(tmp_path / "scan.nii.gz")), some_masks(seed)
    write_nifti(str(tmp_path / "masks.nii.gz"), label_map(by_slices(masks, scan, plane), scan.shape), scan)
    written, source = nibabel.load(tmp_path / "masks.nii.gz"), nibabel.load(tmp_path / "scan.nii.gz")
    assert np.array_equal(written.affine, source.affine) and written.get_data_dtype() == np.uint8
    for number, mask in enumerate(masks.values(), start=1):
        np.testing.assert_array_equal(np.asarray(written.dataobj) == number, mask)


@pytest.mark.parametrize("direction", [AXIAL, SAGITTAL, (0.8, 0.6, 0, 0, 0, -1), (-1, 0, 0, 0, 1, 0)])
@pytest.mark.parametrize("overlap", [False, True])
def test_masks_written_to_dicom_are_the_ones_drawn(tmp_path, direction, overlap):
    shape = (8, 6, 7)  # GDCM takes frames of one bit for whole bytes
    write_series(
        tmp_path / "scan", some_values(shape), spacing=(0.5, 0.75, 2.5), direction=direction, origin=(-12.5, 30, 7)
    )
    scan, masks = read_scan(str(tmp_path / "scan")), some_masks(shape=shape, overlap=overlap)
    write_dicom_seg(str(tmp_path / "seg.dcm"), by_slices(masks, scan, "acquired"), scan, "a model")
    found = read_dicom_masks(read_header(str(tmp_path / "seg.dcm")), scan)
    assert list(found) == list(masks)
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask)
    segmentation = hd.seg.segread(str(tmp_path / "seg.dcm"))
    assert segmentation.number_of_segments == 3
    for number, mask in enumerate(masks.values(), start=1):
        theirs = segmentation.get_volume(segment_numbers=[number], combine_segments=True)
        turned, _ = onto(theirs.array > 0, np.diag([-1, -1, 1, 1]) @ theirs.affine, scan.affine)
        np.testing.assert_array_equal(turned, mask)
    image = sitk.ReadImage(str(tmp_path / "seg.dcm"))
    frames = sitk.GetArrayFromImage(image).reshape(3, 7, 6, 8) > 0
    order = 1 if np.allclose(itk_affine(image)[:3, 3], scan.affine[:3, 3], atol=1e-3) else -1
    for frame, mask in zip(frames, masks.values(), strict=True):
        np.testing.assert_array_equal(frame[::order].transpose(2, 1, 0), mask)


@given(affine=affines(), plane=st.sampled_from(PLANES), seed=st.integers(0, 99))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_masks_drawn_on_any_plane_are_those_of_the_segmentation(tmp_path_factory, affine, plane, seed):
    """Series of any orientation and voxel size; DICOM stores directions and places in decimals."""
    folder = tmp_path_factory.mktemp("series")
    spacing = np.linalg.norm(affine[:3, :3], axis=0).round(3)
    along, down = (np.diag([-1, -1, 1]) @ affine[:3, axis] / np.linalg.norm(affine[:3, axis]) for axis in (0, 1))
    direction = [float(f"{x:.9f}") for x in (*along, *down)]
    write_series(folder / "scan", some_values(), spacing=spacing, direction=direction, origin=affine[:3, 3].round(2))
    scan, masks = read_scan(str(folder / "scan")), some_masks(seed)
    write_dicom_seg(str(folder / "seg.dcm"), by_slices(masks, scan, plane), scan, "a model")
    found = read_dicom_masks(read_header(str(folder / "seg.dcm")), scan)
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name], mask)


def test_segments_have_coded_concepts_and_frames_on_all_slices(tmp_path):
    write_series(tmp_path / "scan", some_values())
    scan = read_scan(str(tmp_path / "scan"))
    write_dicom_seg(str(tmp_path / "seg.dcm"), some_masks(), scan, "a model")
    data = pydicom.dcmread(tmp_path / "seg.dcm")
    kinds = [segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for segment in data.SegmentSequence]
    assert kinds == ["Liver", "Neoplasm", "Tissue"] and data.NumberOfFrames == 21
    assert data.PatientID == "K-4711" and data.Modality == "SEG"
    assert data.FrameOfReferenceUID == pydicom.dcmread(scan.files[0]).FrameOfReferenceUID
    with pytest.raises(DataError, match="at least one structure"):
        write_dicom_seg(str(tmp_path / "none.dcm"), {}, scan, "a model")


@pytest.mark.parametrize(
    "name, meaning", [("left_kidney", "Kidney"), ("Oedema", "Edema"), ("spinal cord", "Spinal cord"), ("x", "Tissue")]
)
def test_concepts_by_words(name, meaning):
    assert concept_of(name)[1].meaning == meaning


def test_nifti_is_no_source_of_dicom(tmp_path):
    save(tmp_path / "scan.nii.gz", some_values())
    with pytest.raises(DataError, match="needs a DICOM series"):
        write_dicom_seg(str(tmp_path / "x.dcm"), some_masks(), read_scan(str(tmp_path / "scan.nii.gz")), "a model")


def test_masks_of_dicom_are_found_beside_their_series(tmp_path):
    for name in "ab":
        write_series(tmp_path / name, some_values())
        scan = read_scan(str(tmp_path / name))
        write_dicom_seg(str(tmp_path / f"{name}.seg"), some_masks(), scan, "a model")
    found = find_scans(str(tmp_path))
    assert len(found.scans) == 2 and len(found.masks) == 2 and not found.problems
    for scan in found.scans:
        (mine,) = masks_of(found.masks, scan.series, scan.reference)
        assert mine.file.endswith(f"{scan.place}.seg")


def test_a_segmentation_beside_the_scan_is_refused(tmp_path):
    write_series(tmp_path / "a", some_values())
    write_series(tmp_path / "b", some_values(), origin=(0.4, 0, 0))
    write_dicom_seg(str(tmp_path / "seg.dcm"), some_masks(), read_scan(str(tmp_path / "a")), "a model")
    with pytest.raises(DataError, match="another grid"):
        read_dicom_masks(read_header(str(tmp_path / "seg.dcm")), read_scan(str(tmp_path / "b")))


def test_a_real_segmentation_lies_on_its_own_grid():
    header = read_header(real("liver.dcm"))
    data = pydicom.dcmread(real("liver.dcm"))
    places = sorted(
        float(g.PlanePositionSequence[0].ImagePositionPatient[2]) for g in data.PerFrameFunctionalGroupsSequence
    )
    affine = np.diag([-0.810547, -0.810547, 1, 1.0])
    affine[:3, 3] = 235.2, 226.8, places[0]
    scan = Volume(np.zeros((512, 512, 3), np.int16), affine, "x")
    masks = read_dicom_masks(header, scan)
    assert list(masks) == ["Liver"] and int(masks["Liver"].sum()) == int(data.pixel_array.sum()) > 10000


def write_structures(path, source, contours):
    """An RTSTRUCT {name: outlines in LPS mm [n, 3]}."""
    from pydicom.dataset import Dataset

    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", pydicom.uid.generate_uid()
    data.Modality, data.SeriesInstanceUID = "RTSTRUCT", pydicom.uid.generate_uid()
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    study.RTReferencedSeriesSequence, frame.FrameOfReferenceUID = [series], source.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    data.ReferencedFrameOfReferenceSequence, data.StructureSetROISequence, data.ROIContourSequence = [frame], [], []
    for number, (name, outlines) in enumerate(contours.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber, drawn.ContourSequence = number, name, number, []
        for outline in outlines:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(outline)
            contour.ContourData = [float(x) for x in np.ravel(outline)]
            drawn.ContourSequence.append(contour)
        data.StructureSetROISequence.append(roi)
        data.ROIContourSequence.append(drawn)
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = (
        data.SOPClassUID,
        data.SOPInstanceUID,
    )
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)


def test_structures_of_rtstruct_become_masks_with_holes(tmp_path):
    values = some_values((20, 24, 5))
    source = write_series(tmp_path / "scan", values, spacing=(0.5, 0.75, 2.5), origin=(-12.5, 30, 7))[0]
    scan = read_scan(str(tmp_path / "scan"))

    def square(low, high, number):
        corners = np.array([(low, low), (high, low), (high, high), (low, high)]) - 0.5
        return np.column_stack([corners * (0.5, 0.75) + (-12.5, 30), np.full(4, 7 + 2.5 * number)])

    write_structures(
        tmp_path / "rt.dcm", source, {"ring": [square(3, 12, 2), square(5, 8, 2)], "spot": [square(1, 2, 4)]}
    )
    (header,) = masks_of(find_scans(str(tmp_path)).masks, str(source.SeriesInstanceUID), "")
    masks = read_dicom_masks(header, scan)
    expected = np.zeros(scan.shape, bool)
    expected[3:12, 3:12, 2] = True
    expected[5:8, 5:8, 2] = False
    np.testing.assert_array_equal(masks["ring"], expected)
    assert masks["spot"].sum() == 1 and masks["spot"][1, 1, 4]
    write_structures(tmp_path / "rt.dcm", source, {"between": [square(3, 12, 2.4)]})
    with pytest.raises(DataError, match="beside the scan's slices"):
        read_dicom_masks(read_header(str(tmp_path / "rt.dcm")), scan)


def test_an_outline_holds_the_pixels_whose_centres_it_holds():
    outline = np.array([(1.2, 0.4), (8.1, 3.3), (4.4, 9.6), (2.5, 4.4)])
    expected = np.array([[_wound(outline, x, y) for y in range(11)] for x in range(10)])
    np.testing.assert_array_equal(inside(outline, (10, 11)), expected)


def _wound(outline, x, y):
    angles = np.arctan2(outline[:, 1] - y, outline[:, 0] - x)
    turns = np.diff(np.append(angles, angles[0]))
    return abs(((turns + np.pi) % (2 * np.pi) - np.pi).sum()) > 3


NAMES = {
    "dataset.json": json.dumps({"labels": {"background": 0, "liver": 1, "kidneys": [2, 3]}}),
    "old.json": json.dumps({"labels": {"0": "background", "1": "liver", "2": "kidneys"}}),
    "plain.json": json.dumps({"1": {"name": "liver", "voxels": 3}, "2": {"name": "kidneys"}}),
    "names.tsv": "index\tname\n1\tliver\n2\tkidneys\n",
    "names.csv": "1,liver\n2,kidneys\n",
    "names.txt": "# of us\nliver=1\nkidneys = 2\n",
}


@pytest.mark.parametrize("file", NAMES)
def test_names_of_labels(tmp_path, file):
    (tmp_path / file).write_text(NAMES[file])
    labels = read_labels(str(tmp_path / file))
    assert labels == {"liver": (1,), "kidneys": (2, 3) if file == "dataset.json" else (2,)}


@pytest.mark.parametrize(
    "text", ["[1]", '{"labels": {"a": "b", "c": 1}}', "{", '{"labels": {"1": "a", "2": "a"}}', "{}"]
)
def test_names_that_cannot_be_used_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match="names of labels"):
        read_labels(str(tmp_path / "x.json"))


def test_label_maps_and_masks_on_other_axes(tmp_path):
    affine = np.diag([1.0, 2, 3, 1])
    save(tmp_path / "scan.nii", some_values(), affine)
    scan, labels = read_scan(str(tmp_path / "scan.nii")), np.random.default_rng(0).integers(0, 3, SHAPE, np.uint8)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = SHAPE[0] - 1
    save(tmp_path / "map.nii", labels[::-1], affine @ flip)
    np.testing.assert_array_equal(read_label_map(str(tmp_path / "map.nii"), scan), labels)
