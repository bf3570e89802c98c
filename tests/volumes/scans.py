"""Scans that the tests make, and the real ones of pydicom's packages."""

import os

import data_store
import nibabel
import numpy as np
import pydicom
import pydicom.data
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

PYDICOM = os.path.join(os.path.dirname(pydicom.data.__file__), "test_files")
PYDICOM_DATA = os.path.join(os.path.dirname(data_store.__file__), "data")
AXIAL = (1, 0, 0, 0, 1, 0)
SAGITTAL = (0, 1, 0, 0, 0, -1)


def real(name):
    """The path of a test file of pydicom or pydicom-data."""
    paths = (os.path.join(folder, name) for folder in (PYDICOM, PYDICOM_DATA))
    return next(path for path in paths if os.path.exists(path))


def write_nifti(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def write_dicom(path, values, **tags):
    """One CT slice int16 [rows, columns], stored as (HU + 1024) / 2 would be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.Modality, data.PatientName, data.PatientID = "CT", "Somebody^Known", "K-4711"
    data.Rows, data.Columns = values.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleIntercept, data.RescaleSlope = -1024, 2
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.astype(np.int16).tobytes()
    data.save_as(path)
    return data


def write_series(folder, values, *, spacing=(1, 1, 2), direction=AXIAL, origin=(0, 0, 0), shift=0, **tags):
    """A CT series of even HU [columns, rows, slices] in shuffled files without suffix; returns its datasets."""
    along, down = np.array(direction, float).reshape(2, 3)
    step = np.cross(along, down) * spacing[2] + np.array(shift)
    study = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    study |= {"StudyDate": "20200101", "StudyTime": "101010", "StudyID": "1", "SeriesNumber": 1, "AccessionNumber": ""}
    study |= {"PatientBirthDate": "", "PatientSex": "O", "ReferringPhysicianName": "", "PositionReferenceIndicator": ""}
    made = []
    for k in range(values.shape[2]):
        place = {
            "ImagePositionPatient": [float(x) for x in origin + k * step],
            "ImageOrientationPatient": list(direction),
            "PixelSpacing": [spacing[1], spacing[0]],
            "SliceThickness": spacing[2],
            "InstanceNumber": values.shape[2] - k,
        }
        path = folder / f"{(values.shape[2] - k) ^ 1:03d}"
        made.append(write_dicom(path, (values[:, :, k].T + 1024) // 2, **study | place | tags))
    return made


def lps_affine(spacing, direction, origin):
    """What an affine in RAS+ has to be for these tags."""
    along, down = np.array(direction, float).reshape(2, 3)
    affine = np.eye(4)
    affine[:3] = np.stack([along * spacing[0], down * spacing[1], np.cross(along, down) * spacing[2], origin], axis=1)
    return np.diag([-1, -1, 1, 1]) @ affine


def some_values(shape=(5, 6, 7), seed=0):
    return np.random.default_rng(seed).integers(-500, 500, shape).astype(np.int16) * 2
