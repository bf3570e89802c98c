"""Real DICOM files: values as GDCM reads them, windows as the standard says, and what is no picture refused by name."""

import os

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.dicom import MASKS, read_header
from medplib_jax.volumes.pictures import pictures
from medplib_jax.volumes.read import find_scans, read_scan
from tests.volumes.scans import PYDICOM, PYDICOM_DATA, real, write_dicom

FILES = sorted(
    os.path.join(folder, name)
    for root in (os.path.join(PYDICOM, ".."), PYDICOM_DATA)
    for folder, _, names in os.walk(root)
    for name in names
    if not name.endswith((".py", ".pyc"))
)
UNLIKE_GDCM = {  # file -> why our values are right
    "eCT_Supplemental.dcm": "GDCM leaves frames in the order of the file; ours are sorted",
    "mlut_18.dcm": "GDCM does not apply the Modality LUT",
    **dict.fromkeys(
        ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle_16bit_2frame.dcm", "SC_rgb_rle_32bit.dcm", "SC_rgb_rle_32bit_2frame.dcm"),
        "GDCM swaps the bytes of RLE with more than 8 bits; ours equal the uncompressed files",
    ),
}


def picture(path, windows=None, number=0):
    return pictures(read_scan(path), windows=windows)[number]


@pytest.fixture(scope="module")
def read():
    """What became of each test file: its volume, or the error that refuses it."""
    found = {}
    for path in FILES:
        try:
            if read_header(path).word in MASKS:
                continue
            found[path] = find_scans(path).scans[0].read()
        except DataError as error:
            found[path] = error
    return found


def test_every_test_file_is_read_as_gdcm_does_or_refused(read):
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    assert len(read) > 250
    compared = 0
    for path, volume in read.items():
        name = os.path.basename(path)
        if isinstance(volume, DataError) or name in UNLIKE_GDCM:
            continue
        image = sitk.ReadImage(path, imageIO="GDCMImageIO")
        theirs = sitk.GetArrayFromImage(image)
        ours = volume.values.transpose(2, 1, 0, *range(3, volume.values.ndim)).astype(np.float64)
        if volume.is_colour and theirs.dtype != np.uint8:
            theirs = theirs >> (8 * theirs.dtype.itemsize - 8)
        theirs = theirs.reshape(ours.shape).astype(np.float64)
        if volume.inverted:  # GDCM turns these round
            rest = ours + theirs
            assert np.ptp(rest) < 1e-3, name
        else:
            lossless = name.startswith(("J2K", "SC_rgb_rle")) or not volume.is_colour
            assert np.abs(ours - theirs).max() <= (1 if lossless else 5), name  # decoders of JPEG round differently
        if volume.located and image.GetDimension() == 3:
            np.testing.assert_allclose(volume.spacing[:2], image.GetSpacing()[:2], rtol=1e-4, err_msg=name)
        compared += 1
    assert compared > 140


def test_refused_files_say_why(read):
    refused = {os.path.basename(path): error for path, error in read.items() if isinstance(error, DataError)}
    pictures = {name for name, error in refused.items() if error.what == "scan cannot be read"}
    assert {name for name in pictures if name.endswith(".dcm")} == {
        "JPEG-lossy.dcm",  # no codec of pydicom's decodes it
        "JPEG2000-embedded-sequence-delimiter.dcm",
        "MR_truncated.dcm",
        "empty_charset_LEI.dcm",
        "no_meta.dcm",
    }
    for name in ("rtdose.dcm", "reportsi.dcm", "rtplan.dcm", "waveform_ecg.dcm", "DICOMDIR"):
        assert refused[name].what == "DICOM object is not a picture" and refused[name].found


@pytest.mark.parametrize(
    "one, same",
    [
        ("SC_rgb_rle_16bit.dcm", "SC_rgb_16bit.dcm"),
        ("SC_rgb_rle_32bit_2frame.dcm", "SC_rgb_32bit_2frame.dcm"),
        ("OBXXXX1A_expb.dcm", "OBXXXX1A.dcm"),
        ("emri_small_RLE.dcm", "emri_small.dcm"),
        ("emri_small_big_endian.dcm", "emri_small.dcm"),
    ],
)
def test_encodings_of_one_picture_are_one_picture(one, same):
    np.testing.assert_array_equal(read_scan(real(one)).values, read_scan(real(same)).values)


def test_enhanced_ct_takes_rescale_and_window_of_its_functional_groups():
    volume = read_scan(real("eCT_Supplemental.dcm"))
    assert (volume.values.min(), volume.values.max()) == (-1024, 172)
    assert (volume.tone.low, volume.tone.high) == (-2, 99)  # 49/102
    assert (picture(real("eCT_Supplemental.dcm"), ((40, 400),)) == 255).mean() == 0
    np.testing.assert_allclose(volume.spacing, [0.388672, 0.388672, 10])


def test_a_multi_frame_file_without_places_is_one_volume_that_says_so():
    volume = read_scan(real("emri_small.dcm"))
    assert volume.shape == (64, 64, 10) and volume.modality == "MR" and not volume.located


def test_the_files_own_window_is_the_same_on_all_slices(tmp_path):
    for name, units in (("a", [0, 100, 240]), ("b", [-1000, 100, 3000])):
        write_dicom(tmp_path / f"{name}.dcm", (np.array([units]) + 1024) // 2, WindowCenter=40, WindowWidth=400)
    shown = [picture(str(tmp_path / f"{name}.dcm"))[0].tolist() for name in "ab"]
    assert shown == [[102, 166, 255], [0, 166, 255]]


@pytest.mark.parametrize("function, grey", [("LINEAR", 166), ("LINEAR_EXACT", 166), ("SIGMOID", 165)])
def test_window_functions_of_the_standard(tmp_path, function, grey):
    tags = {"WindowCenter": [40, 400], "WindowWidth": [400, 2000], "VOILUTFunction": function}
    write_dicom(tmp_path / "x.dcm", np.array([[(100 + 1024) // 2]]), **tags)
    assert picture(str(tmp_path / "x.dcm"))[0, 0] == grey


def test_a_table_of_grey_is_applied():
    plain = pydicom.dcmread(real("vlut_04.dcm"))
    expected = pydicom.pixels.apply_voi_lut(plain.pixel_array, plain)
    top = 2.0 ** plain.VOILUTSequence[0].LUTDescriptor[2] - 1
    np.testing.assert_allclose(picture(real("vlut_04.dcm")), expected / top * 255, atol=0.5)


def test_monochrome1_is_shown_inverted_and_keeps_its_values():
    volume = read_scan(real("RG3_UNCR.dcm"))
    assert volume.inverted and volume.modality == "X-ray"
    np.testing.assert_array_equal(volume.values[:, :, 0].T, pydicom.dcmread(real("RG3_UNCR.dcm")).pixel_array)
    grey = picture(real("RG3_UNCR.dcm"))
    dark = volume.values[:, :, 0].T > np.percentile(volume.values, 90)
    assert grey.shape == dark.shape and grey[dark].mean() < grey[~dark].mean()


def test_palette_colour_is_shown_in_its_colours():
    shown = picture(real("examples_palette.dcm"))
    assert shown.ndim == 3 and np.ptp(shown.astype(int), axis=-1).max() > 50


@pytest.mark.parametrize(
    "word, modality", [("OP", "fundus photography"), ("OPT", "OCT"), ("RF", "X-ray"), ("OT", ""), ("CT", "CT")]
)
def test_modality_words(tmp_path, word, modality):
    write_dicom(tmp_path / "x.dcm", np.zeros((4, 4)), Modality=word)
    assert read_scan(str(tmp_path / "x.dcm")).modality == modality


def test_a_file_without_suffix_and_preamble_is_read():
    data = pydicom.dcmread(real("CT_small.dcm"))
    np.testing.assert_array_equal(
        read_scan(real("CT_small.dcm")).values[:, :, 0].T, data.pixel_array * data.RescaleSlope + data.RescaleIntercept
    )
    path = os.path.join(PYDICOM, "dicomdirtests", "77654033", "CT2", "17106")
    assert read_scan(path).shape == (16, 16, 1)


def test_unusual_bits_are_refused(tmp_path):
    write_dicom(tmp_path / "x.dcm", np.zeros((4, 4)), BitsStored=12, HighBit=15)
    with pytest.raises(DataError, match="unusual bits"):
        read_scan(str(tmp_path / "x.dcm"))
