"""Scans as they lie on a disk: the one way in which all commands find and read them.

DICOM files need no suffix; those of a series make one volume, sorted along the normal of its slices, in whatever
folders they lie. NIfTI, NRRD and MetaImage are known by their suffix. A volume's name follows its path, in which a
patient's name or number is replaced by a hash.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Sequence

from medplib_jax.data.errors import DataError, Notice
from medplib_jax.volumes.dicom import MASKS, Header, read_header
from medplib_jax.volumes.formats import SUFFIXES, read_volume_file, volumes_in, without_suffix
from medplib_jax.volumes.series import Stack, read_stack, stacks
from medplib_jax.volumes.volume import MAX_VOXELS, Volume, hashed

_DETACHED = (".raw", ".zraw")  # voxels of a header in a file of its own (.mhd, .nhdr)


@dataclasses.dataclass(frozen=True)
class ScanFile:
    """A scan that was found and not read yet.

    place: its path below the searched folder without suffix; name: the same for output.
    """

    place: str
    name: str
    path: str
    stack: Stack | None = None
    patient: str = ""
    series: str = ""
    reference: str = ""  # uid of DICOM's frame of reference

    @property
    def files(self) -> tuple[str, ...]:
        return self.stack.files if self.stack else (self.path,)

    def read(self, index: int | None = None, most: int = MAX_VOXELS) -> Volume:
        """The scan's voxels, at most `most`. index: which of a fourth axis. DataError for what cannot be used."""
        if self.stack is None:
            return read_volume_file(self.path, self.name, index, most)
        if index not in (None, 0):
            raise DataError(self.path, None, "no such volume in the file", "index 0", str(index))
        return read_stack(self.stack, self.name, self.patient, most)


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies in a folder: scans, DICOM's own masks (SEG, RTSTRUCT), and what is neither."""

    scans: tuple[ScanFile, ...]
    masks: tuple[Header, ...]
    problems: tuple[DataError, ...]


def find_scans(path: str) -> Found:
    """The scans of a file or of all files below a folder, by their headers.

    Each file that is no scan is in `problems`.
    """
    root = path if os.path.isdir(path) else os.path.dirname(path) or "."
    files = sorted(_files_below(path)) if os.path.isdir(path) else [path]
    scans, headers, masks, problems = [], [], [], []
    for file in files:
        if file.lower().endswith(SUFFIXES):
            place = without_suffix(os.path.relpath(file, root))
            scans.append(ScanFile(place, place, file))
            continue
        try:
            header = read_header(file)
        except DataError as error:
            problems.append(error)
            continue
        (masks if header.word in MASKS else headers).append(header)
    found, broken = stacks(headers)
    scans += _named(found, root)
    return Found(tuple(sorted(scans, key=lambda scan: scan.place)), tuple(masks), tuple(problems + broken))


def read_scan(path: str, index: int | None = None, most: int = MAX_VOXELS) -> Volume:
    """The one scan that a file or folder holds. DataError when it holds none or several, is broken or too large.

    index: which of several, in the order of their names, or of a fourth axis. The volume's notices name files that were
    left out.
    """
    if not os.path.exists(path):
        raise DataError(path, None, "no such file or folder", "a scan", "nothing")
    found = find_scans(path)
    if not found.scans:
        raise (
            found.problems[0]
            if found.problems
            else DataError(path, None, "no scans", "DICOM, NIfTI, NRRD or MetaImage", "none")
        )
    if len(found.scans) > 1 and (index is None or not 0 <= index < len(found.scans)):
        names = ", ".join(scan.name for scan in found.scans[:8]) + (", ..." if len(found.scans) > 8 else "")
        expected = f"an index from 0 to {len(found.scans) - 1} (--index)"
        raise DataError(path, None, "several scans", expected, f"{len(found.scans)}: {names}")
    volume = found.scans[0].read(index, most) if len(found.scans) == 1 else found.scans[index].read(most=most)
    left_out = tuple(Notice(one.file, one.record, one.what, one.expected, one.found) for one in found.problems)
    return dataclasses.replace(volume, notices=volume.notices + left_out)


def count_volumes(path: str) -> int:
    """How many volumes `read_scan` can be asked for by their index: scans, or entries of one file's fourth axis."""
    scans = find_scans(path).scans
    return volumes_in(scans[0].path) if len(scans) == 1 and scans[0].stack is None else len(scans)


def is_scan(path: str) -> bool:
    """Whether a path is a volume or DICOM: a folder, a volume's suffix, or DICOM's own mark.

    Pictures (PNG, JPEG, ...) are not.
    """
    if os.path.isdir(path) or path.lower().endswith((*SUFFIXES, ".dcm")):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _files_below(root: str) -> list[str]:
    """All but hidden ones, Windows' Thumbs.db and voxels that belong to a header beside them."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        detached = _DETACHED if any(name.lower().endswith((".mhd", ".nhdr")) for name in names) else ()
        names = [name for name in names if not name.startswith(".") and name != "Thumbs.db"]
        found += [os.path.join(folder, name) for name in names if not name.lower().endswith(tuple(detached))]
    return found


def _named(found: Sequence[Stack], root: str) -> list[ScanFile]:
    """Volumes of one file are called after it, others after their folder; several there also by their series' hash."""
    places = [_place(stack, root) for stack in found]
    taken = collections.Counter(places)
    scans = []
    for stack, place in zip(found, places, strict=True):
        first = stack.first
        if taken[place] > 1:
            place = "--".join(
                filter(None, [place, hashed(first.series or first.file, 8), stack.part and f"t{stack.part}"])
            )
        scans.append(
            ScanFile(place, _anonymous(place, first), first.file, stack, first.patient, first.series, first.reference)
        )
    names = collections.Counter(scan.place for scan in scans)
    seen: collections.Counter = collections.Counter()
    for number, scan in enumerate(scans):
        if names[scan.place] > 1:  # one series with stacks of several directions
            end = f"--{seen[scan.place]}"
            seen[scan.place] += 1
            scans[number] = dataclasses.replace(scan, place=scan.place + end, name=scan.name + end)
    return scans


def _place(stack: Stack, root: str) -> str:
    files = stack.files
    if len(files) == 1:
        return (
            without_suffix(os.path.relpath(files[0], root))
            if files[0].lower().endswith(".dcm")
            else os.path.relpath(files[0], root)
        )
    common = os.path.relpath(
        os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]), os.path.abspath(root)
    )
    return os.path.basename(os.path.abspath(root)) if common == "." else common


def _anonymous(place: str, header: Header) -> str:
    """The place without the patient's name and number, which give way to the patient's hash."""
    words = {word for text in header.identity for word in (text, *re.split(r"[\s^=]+", text)) if len(word) > 2}
    for word in sorted(words, key=len, reverse=True):
        place = re.sub(re.escape(word), header.patient, place, flags=re.IGNORECASE)
    return place
