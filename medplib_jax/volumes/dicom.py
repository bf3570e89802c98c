"""One DICOM file: its frames' places, values and windows from the header, and its pixels in the scan's units.

Values of a frame are read where the standard puts them: in the file itself, or for enhanced multi-frame objects in the
shared and then the frame's own functional groups (PS3.3 C.7.6.16).
"""

import dataclasses
import logging
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from medplib_jax.data.errors import DataError
from medplib_jax.volumes.volume import check_size, hashed
from medplib_jax.volumes.windows import Tone, centred

MODALITIES = {  # PS3.3 C.7.3.1.1.1 -> words; "": the file does not tell what the picture is of
    **dict.fromkeys(("CR", "DX", "RF", "IO", "PX", "RG"), "X-ray"),
    **dict.fromkeys(("US", "IVUS", "BDUS"), "ultrasound"),
    **dict.fromkeys(("PT",), "PET"),
    **dict.fromkeys(("NM", "ST"), "nuclear medicine"),
    **dict.fromkeys(("XA", "DS", "DF"), "angiogram"),
    **dict.fromkeys(("SM", "HC"), "histopathology"),
    **dict.fromkeys(("OPT", "IVOCT", "OCT"), "OCT"),
    **dict.fromkeys(("XC", "DMS"), "photography"),
    **dict.fromkeys(("OT", "SC", "DG"), ""),
    "MG": "mammogram",
    "OP": "fundus photography",
    "ES": "endoscopy",
    "GM": "microscopy",
    "CP": "colposcopy",
}
MASKS = ("SEG", "RTSTRUCT")  # DICOM's own forms of masks
_UNCOMPRESSED = {"1.2.840.10008.1.2": 8, "1.2.840.10008.1.2.1": 12}  # little-endian: bytes before the pixels' first
_GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "")  # the last: old files do not say
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "YBR_ICT", "YBR_RCT")
_NOT_PICTURES = ("RTDOSE", "RTPLAN", "RTRECORD", "SR", "PR", "KO", "REG", "RWV", "FID", "ECG")
_TIMES = (  # what tells slices of one place from each other, in this order
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "EchoNumbers",
    "EchoTime",
    "EffectiveEchoTime",
    "DiffusionBValue",
    "TriggerTime",
    "AcquisitionNumber",
    "FrameAcquisitionNumber",
    "AcquisitionTime",
    "ImageType",
    "FrameType",
)
_GROUPS = (
    "FrameContentSequence",
    "MREchoSequence",
    "MRDiffusionSequence",
    "CTImageFrameTypeSequence",
    "MRImageFrameTypeSequence",
)


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame of a file. Lengths in mm, directions and positions in LPS as DICOM has them.

    spacing: from row to row and from column to column. thickness: to the next slice, as far as a single slice can know
    it. measured: whether the spacing is that in the patient. direction: of the rows and of the columns, [2, 3]. times:
    (tag, value) of what may tell it from others of the same place.
    """

    file: str
    index: int
    uid: str
    spacing: tuple[float, float]
    measured: bool
    thickness: float
    position: np.ndarray | None
    direction: np.ndarray | None
    slope: float
    intercept: float
    tone: Tone | None
    times: tuple[tuple[str, str], ...]
    number: int
    stack: str


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself. identity: the patient's name and number, which must not be written anywhere."""

    file: str
    word: str  # DICOM's modality
    modality: str
    patient: str  # a hash
    identity: tuple[str, ...] = dataclasses.field(repr=False)
    series: str
    reference: str  # uid of the frame of reference
    size: tuple[int, int]
    colour: bool
    inverted: bool
    integral: bool  # pixels are integers, and there is no table that changes them
    frames: tuple[Frame, ...]
    plain: tuple[int, str] | None  # where pixels begin that need no decoding, and their type


def read_header(path: str) -> Header:
    """Of a picture, or of masks (`MASKS`; without frames). DataError for what is not DICOM or neither of them."""
    with guarded(path, "DICOM"):
        with open(path, "rb") as file:
            data = open_dicom(path, pixels=False, file=file)
            end = file.tell()
        word = str(data.get("Modality", "") or "")
        word = {"1.2.840.10008.5.1.4.1.1.66.4": "SEG", "1.2.840.10008.5.1.4.1.1.481.3": "RTSTRUCT"}.get(
            str(data.get("SOPClassUID", "")), word
        )
        if word not in MASKS and (word in _NOT_PICTURES or not data.get("Rows") or not data.get("Columns")):
            raise DataError(path, None, "DICOM object is not a picture", "pixels of a scan", _kind(data, word))
        name, number = str(data.get("PatientName", "") or ""), str(data.get("PatientID", "") or "")
        if word not in MASKS:
            _check_kind_of_pixels(path, data)
        size = (int(data.get("Rows") or 0), int(data.get("Columns") or 0))
        is_masks = word in MASKS
        frames = () if is_masks else tuple(_frames(path, data, size))
        return Header(
            file=path,
            word=word,
            modality=MODALITIES.get(word, word),
            patient=_patient(data),
            identity=(name, number),
            series=str(data.get("SeriesInstanceUID", "") or ""),
            reference=str(data.get("FrameOfReferenceUID", "") or ""),
            size=size,
            colour=not is_masks
            and (_photometric(data) == "PALETTE COLOR" or int(data.get("SamplesPerPixel") or 1) == 3),
            inverted=_photometric(data) == "MONOCHROME1",
            integral=bool(data.get("BitsStored")) and "ModalityLUTSequence" not in data,
            frames=frames,
            plain=None if is_masks else _plain(data, path, end),
        )


def read_pixels(header: Header) -> np.ndarray:
    """The file's frames as stored, [n, rows, columns], or colour uint8 [n, rows, columns, 3].

    A file with a table of its own for values (Modality LUT) is in the scan's units already.
    """
    path = header.file
    shape = (len(header.frames), *header.size)
    with guarded(path, "DICOM with pixels"):
        if header.plain:
            start, kind = header.plain
            pixels = np.fromfile(path, kind, int(np.prod(shape)), offset=start)
            if pixels.size != np.prod(shape):
                raise ValueError(f"{pixels.nbytes} bytes of pixels, expected {2 * np.prod(shape)}")
            return pixels.reshape(shape)
        data = open_dicom(path, pixels=True)
        if not any(name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise DataError(path, None, "DICOM object is not a picture", "pixels of a scan", "no pixel data")
        bits, high = int(data.get("BitsStored") or 0), data.get("HighBit")
        if bits and high is not None and int(high) + 1 != bits:
            raise DataError(path, None, "pixels lie in unusual bits", f"high bit {bits - 1}", str(high))
        pixels = data.pixel_array
        if _photometric(data) == "PALETTE COLOR":
            pixels = _coloured(data, pixels)
        elif header.colour and bits > 8:
            pixels = pixels >> (bits - 8)
        elif "ModalityLUTSequence" in data:
            from pydicom.pixels import apply_modality_lut

            pixels = apply_modality_lut(pixels, data)
        return pixels.astype(np.uint8, copy=False).reshape(*shape, 3) if header.colour else pixels.reshape(shape)


class guarded:
    """Makes DataErrors of what pydicom and its codecs raise; drops their warnings and logs, which may hold names."""

    def __init__(self, path: str, expected: str):
        self._path, self._expected, self._quiet = path, expected, warnings.catch_warnings()
        self._log = logging.getLogger("pydicom")

    def __enter__(self):
        self._quiet.__enter__()
        warnings.simplefilter("ignore")
        self._handlers, self._propagate = self._log.handlers, self._log.propagate
        self._log.handlers, self._log.propagate = [logging.NullHandler()], False

    def __exit__(self, kind, error, trace):
        self._log.handlers, self._log.propagate = self._handlers, self._propagate
        self._quiet.__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, DataError):
            found = f"{kind.__name__}: {error}".splitlines()[0][:300]
            raise DataError(self._path, None, "scan cannot be read", self._expected, found) from error


def open_dicom(path: str, pixels: bool, file: BinaryIO | None = None) -> Any:
    """The dataset. Files without preamble are tried, too; what says neither what it is nor how large is not DICOM."""
    import pydicom  # only scans need it
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    data = pydicom.dcmread(file or path, stop_before_pixels=not pixels, force=True)
    known = getattr(data, "file_meta", None) is not None and "MediaStorageSOPClassUID" in data.file_meta
    if not (known or "SOPClassUID" in data or "Rows" in data):
        raise DataError(path, None, "scan cannot be read", "DICOM", "no DICOM object")
    if not getattr(data.file_meta, "TransferSyntaxUID", None):
        implicit, little = data.original_encoding
        plain = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = plain if little else ExplicitVRBigEndian
    return data


def _check_kind_of_pixels(path: str, data: Any) -> None:
    """DataError for pixels that are neither grey with one sample nor colour with three."""
    found, samples = _photometric(data), int(data.get("SamplesPerPixel") or 1)
    if (found, samples) not in [*((grey, 1) for grey in _GREY), *((colour, 3) for colour in _COLOUR)]:
        expected = "grey with 1 sample or colour with 3"
        raise DataError(path, None, "kind of pixels cannot be used", expected, f"{found!r} with {samples}")


def _patient(data: Any) -> str:
    """A hash of the patient's number; of the study or series where there is none, so that its files stay together."""
    values = (str(data.get(tag) or "").strip() for tag in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID"))
    return hashed(next(filter(None, values), ""))


def _kind(data: Any, word: str) -> str:
    uid = data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
    return " ".join(filter(None, [word, getattr(uid, "name", "") or "no rows and columns"]))


def _photometric(data: Any) -> str:
    return str(data.get("PhotometricInterpretation", "") or "")


def _frames(path: str, data: Any, size: tuple[int, int]) -> Iterator[Frame]:
    count = int(data.get("NumberOfFrames") or 1)
    check_size(path, (count, *size))
    own = data.get("PerFrameFunctionalGroupsSequence") or []
    if own and len(own) != count:
        raise DataError(path, None, "frames and their descriptions differ in number", str(count), str(len(own)))
    shared = next(iter(data.get("SharedFunctionalGroupsSequence") or []), None)
    for index in range(count):
        yield _frame(path, index, _Tags(data, shared, own[index] if own else None))


class _Tags:
    """Tags of a frame: from its own functional groups, else the shared ones, else the file."""

    def __init__(self, data: Any, shared: Any, own: Any):
        self._data, self._groups = data, [group for group in (own, shared) if group is not None]
        self.order = "<" if data.original_encoding[1] else ">"  # of bytes

    def item(self, sequence: str) -> Any:
        """The one item of a sequence, the file itself when it is in no functional group."""
        found = (next(iter(group.get(sequence) or []), None) for group in self._groups)
        return next((item for item in found if item is not None), self._data)

    def get(self, sequence: str, tag: str) -> Any:
        value = self.item(sequence).get(tag)
        return self._data.get(tag) if value is None else value

    def numbers(self, sequence: str, tag: str, count: int) -> list[float] | None:
        """`count` finite numbers, None when the tag is missing, empty or of another length."""
        value = self.get(sequence, tag)
        if value is None or value == "" or value == []:
            return None
        values = [float(x) for x in (value if hasattr(value, "__len__") and not isinstance(value, str) else [value])]
        return values if len(values) == count and np.isfinite(values).all() else None

    def anywhere(self, tag: str) -> Any:
        """The value of a tag in whichever of `_GROUPS` holds it."""
        items = (next(iter(group.get(name) or []), None) for group in self._groups for name in _GROUPS)
        found = (item.get(tag) for item in items if item is not None)
        return next((value for value in found if value is not None), self._data.get(tag))

    def rescale(self, tag: str, absent: float) -> float:
        """ValueError for what is there and no finite number."""
        value = self.get("PixelValueTransformationSequence", tag)
        found = absent if value is None or value == "" else float(value)
        if not np.isfinite(found):
            raise ValueError(f"{tag} {value}")
        return found


def _frame(path: str, index: int, tags: _Tags) -> Frame:
    position = tags.numbers("PlanePositionSequence", "ImagePositionPatient", 3)
    direction = tags.numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    located = position is not None and direction is not None and np.any(direction)
    if located:
        direction = np.array(direction).reshape(2, 3)
        if np.abs(direction @ direction.T - np.eye(2)).max() > 1e-3:
            raise DataError(
                path,
                None,
                "direction of the slice cannot be used",
                "two unit vectors at right angles",
                str(direction.tolist()),
            )
    thickness = tags.numbers("PixelMeasuresSequence", "SpacingBetweenSlices", 1) or tags.numbers(
        "PixelMeasuresSequence", "SliceThickness", 1
    )
    slope, intercept = tags.rescale("RescaleSlope", 1.0), tags.rescale("RescaleIntercept", 0.0)
    if slope == 0:
        raise DataError(path, None, "values cannot be scaled", "a rescale slope other than 0", "0")
    times = [(tag, str(tags.anywhere(tag) or "")) for tag in _TIMES]
    spacing, measured = _spacing(tags)
    return Frame(
        file=path,
        index=index,
        uid=str(tags.get("", "SOPInstanceUID") or ""),
        spacing=spacing,
        measured=measured,
        thickness=abs(thickness[0]) if thickness and thickness[0] else 1.0,
        position=np.array(position) if located else None,
        direction=direction if located else None,
        slope=slope,
        intercept=intercept,
        tone=_tone(tags.item("FrameVOILUTSequence"), tags.order),
        times=tuple(times),
        number=int(tags.get("", "InstanceNumber") or 0),
        stack=str(tags.get("FrameContentSequence", "StackID") or ""),
    )


def _spacing(tags: _Tags) -> tuple[tuple[float, float], bool]:
    """(row to row, column to column) in mm, and whether that is so in the patient.

    Otherwise the lengths are those on a detector or a film, or only their proportion is known.
    """
    for tag in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        values = tags.numbers("PixelMeasuresSequence", tag, 2)
        if values and min(values) > 0:
            return (values[0], values[1]), tag == "PixelSpacing"
    region = tags.item("SequenceOfUltrasoundRegions")
    regions = region.get("SequenceOfUltrasoundRegions") or []
    steps = {(abs(float(r.get("PhysicalDeltaY") or 0)), abs(float(r.get("PhysicalDeltaX") or 0))) for r in regions}
    if (
        len(steps) == 1
        and min(*(step := steps.pop())) > 0
        and all(r.get("PhysicalUnitsXDirection") == 3 for r in regions)
    ):
        return (10 * step[0], 10 * step[1]), True  # unit 3 is cm
    return (1.0, 1.0), False


def _tone(item: Any, order: str) -> Tone | None:
    """The first window of a file or frame; a table (VOI LUT) goes before it, as in pydicom."""
    table = next(iter(item.get("VOILUTSequence") or []), None)
    if table is not None:
        _, first, bits = (int(x) for x in table.LUTDescriptor)
        if not 8 <= bits <= 16:
            raise ValueError(f"VOI LUT of {bits} bits")
        data = np.asarray(
            np.frombuffer(table.LUTData, f"{order}u2") if isinstance(table.LUTData, bytes) else table.LUTData,
            np.float64,
        )
        return Tone(float(first), float(first + len(data) - 1), table=tuple((data / (2.0**bits - 1)).tolist()))
    centre, width = (_first(item.get(tag)) for tag in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None or width <= 0:
        return None
    function = str(item.get("VOILUTFunction", "") or "LINEAR")
    if function == "LINEAR" and width >= 1:  # C.11.2.1.2.1: integers, of which both ends count
        return Tone(centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)
    return dataclasses.replace(centred(centre, width), sigmoid=function == "SIGMOID")


def _first(value: Any) -> float | None:
    values = value if hasattr(value, "__len__") and not isinstance(value, str) else [value]
    found = float(values[0]) if len(values) and values[0] not in (None, "") else None
    return found if found is not None and np.isfinite(found) else None


def _plain(data: Any, path: str, start: int) -> tuple[int, str] | None:
    """(place in the file, type) of uncompressed grey of 16 bits without unused ones, None for all other pixels.

    Such pixels are read several times faster than by pydicom. start: where the header ended.
    """
    expected = {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "SamplesPerPixel": 1}
    known = _UNCOMPRESSED.get(data.file_meta.TransferSyntaxUID)
    if known is None or any(data.get(tag) != value for tag, value in expected.items()) or "ModalityLUTSequence" in data:
        return None
    with open(path, "rb") as file:
        file.seek(start)
        element = file.read(known)
    count = int(data.get("NumberOfFrames") or 1) * data.Rows * data.Columns
    length = int.from_bytes(element[-4:], "little")
    if element[:4] != b"\xe0\x7f\x10\x00" or length != 2 * count or _photometric(data) == "PALETTE COLOR":
        return None
    return start + known, "<i2" if data.get("PixelRepresentation") else "<u2"


def _coloured(data: Any, pixels: np.ndarray) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    for colour in ("Red", "Green", "Blue"):  # pydicom takes the bytes of the tables for little-endian
        tag = f"{colour}PaletteColorLookupTableData"
        if tag in data and not data.original_encoding[1] and isinstance(data[tag].value, bytes):
            data[tag].value = np.frombuffer(data[tag].value, ">u2").astype("<u2").tobytes()
    rgb = apply_color_lut(pixels, data)
    return rgb if rgb.dtype == np.uint8 else rgb >> 8
