"""Masks back on a hospital's disk, in the scan's own space: a label map as NIfTI, and DICOM SEG."""

import os
import re
from collections.abc import Mapping

import numpy as np

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.dicom import open_dicom
from medplib_jax.volumes.formats import NIFTI, SUFFIXES
from medplib_jax.volumes.volume import Volume

# Words of pydicom's dictionary of SNOMED CT that a structure's name may hold; a longer one goes before a shorter one.
_LESIONS = ("Neoplasm", "Edema", "Cyst", "Nodule", "Lesion", "Hemorrhage")
_ORGANS = (
    *(
        "SpinalCord",
        "AdrenalGland",
        "LeftVentricle",
        "SmallIntestine",
        "InferiorVenaCava",
        "PortalVein",
        "CaudateNucleus",
    ),
    *("Hippocampus", "Amygdala", "Thalamus", "Putamen", "Gallbladder", "Pancreas", "Esophagus", "Duodenum", "Prostate"),
    *("Kidney", "Liver", "Spleen", "Stomach", "Bladder", "Aorta", "Heart", "Lung", "Brain", "Femur", "Vertebra", "Rib"),
    *("Bone", "Breast", "Trachea", "Thyroid", "Uterus", "Colon"),
)
_SPELLINGS = (
    ("tumour", "neoplasm"),
    ("tumor", "neoplasm"),
    ("cancer", "neoplasm"),
    ("oedema", "edema"),
    ("haem", "hem"),
)
_NEEDED = (  # type 2 tags that a SEG copies from its source, which may lack them
    *(
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "AccessionNumber",
        "StudyID",
        "StudyDate",
        "StudyTime",
    ),
    *("ReferringPhysicianName", "PositionReferenceIndicator"),
)


def is_dicom(scan: Volume) -> bool:
    return not scan.file.lower().endswith(SUFFIXES)


def label_map(masks: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """uint8 or uint16: the first mask is 1, the next 2, ...; where masks meet, the later one."""
    labels = np.zeros(shape, np.uint8 if len(masks) < 256 else np.uint16)
    for number, mask in enumerate(masks.values(), start=1):
        labels[mask] = number
    return labels


def write_nifti(path: str, labels: np.ndarray, scan: Volume) -> None:
    """A label map on the scan's grid.

    Of a scan in NIfTI the affine and the header are kept; units and orientation codes, too.
    """
    import nibabel  # only scans need it

    if scan.files and scan.files[0].lower().endswith(NIFTI):
        source = nibabel.load(scan.files[0])
        header = source.header.copy()
        header.set_data_shape(labels.shape)
        header.set_slope_inter(1, 0)
        header["cal_max"] = header["cal_min"] = 0
        image = type(source)(labels, source.affine, header, dtype=labels.dtype)
    else:
        image = nibabel.Nifti1Image(labels, scan.affine, dtype=labels.dtype)
        image.set_sform(scan.affine, code="scanner")
        image.set_qform(scan.affine, code="scanner", strip_shears=True)
        image.header.set_xyzt_units("mm")
    partial = f"{path}.{os.getpid()}.tmp.nii.gz"
    nibabel.save(image, partial)
    os.replace(partial, path)


def write_dicom_seg(path: str, masks: Mapping[str, np.ndarray], scan: Volume, model: str) -> None:
    """DICOM SEG of the scan's DICOM files, one segment per mask with a coded concept; written with highdicom.

    Every segment has a frame on every slice, empty or not: OHIF and Slicer then show it wherever it lies, and an empty
    segment, too. model: name of what drew the masks. DataError when the scan is not a DICOM series with a place in the
    patient.
    """
    file = scan.file
    if not masks:
        raise DataError(file, None, "DICOM SEG without a mask", "at least one structure", "none")
    if not is_dicom(scan) or not scan.located:
        raise DataError(file, None, "DICOM SEG needs a DICOM series", "slices with a place in the patient", file)
    try:
        import highdicom as hd
        from pydicom.uid import generate_uid
    except ImportError as error:
        raise DataError(file, None, "a package is missing", "pip install 'medplib_jax[dicom]'", str(error)) from error
    sources = [_source(name) for name in scan.files]
    labels = label_map(masks, scan.shape)
    if np.count_nonzero(labels) == sum(int(mask.sum()) for mask in masks.values()):
        pixels = labels.transpose(2, 1, 0)
    else:  # masks meet
        pixels = np.stack([mask.transpose(2, 1, 0) for mask in masks.values()], axis=-1).astype(np.uint8)
    segmentation = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=np.ascontiguousarray(pixels),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(number, name, model) for number, name in enumerate(masks, start=1)],
        series_instance_uid=generate_uid(),
        series_number=1000,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="medplib_jax",
        manufacturer_model_name=model,
        software_versions="1",
        device_serial_number="0",
        series_description="medplib_jax segmentation",
        omit_empty_frames=False,
    )
    partial = f"{path}.{os.getpid()}.tmp"
    segmentation.save_as(partial)
    os.replace(partial, path)


def _source(file: str):
    """A DICOM file's header with all tags that a SEG has to copy."""
    data = open_dicom(file, pixels=False)
    for tag in _NEEDED:
        if tag not in data:
            setattr(data, tag, "")
    return data


def _segment(number: int, name: str, model: str):
    """What a SEG says of one structure: its name, and coded what it is and that a model drew it."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    category, kind = concept_of(name)
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(model, codes.DCM.ArtificialIntelligence, "1"),
    )


def concept_of(name: str):
    """(category, type) of a structure as codes of SNOMED CT, by the words of its name; tissue when no word is known."""
    from pydicom.sr.codedict import codes

    text = name.lower().replace("_", " ")
    for spelling, word in _SPELLINGS:
        text = text.replace(spelling, word)
    for words, category in (
        (_LESIONS, codes.SCT.MorphologicallyAbnormalStructure),
        (_ORGANS, codes.SCT.AnatomicalStructure),
    ):
        for word in words:
            spoken = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", word).lower()
            if re.search(rf"\b{spoken}", text):
                return category, getattr(codes.SCT, word)
    return codes.SCT.Tissue, codes.SCT.Tissue
