"""Slices of DICOM files as volumes: grouped by series, sorted along the normal, checked for gaps and doubles."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from medplib_jax.data.errors import DataError, Notice
from medplib_jax.volumes.dicom import Frame, Header, read_pixels
from medplib_jax.volumes.geometry import SHEAR
from medplib_jax.volumes.volume import LPS_TO_RAS, MAX_VOXELS, Volume, check_affine, check_size

EVENNESS = 0.02  # of a step: how far a slice may lie from its place in an even row


@dataclasses.dataclass(frozen=True)
class Stack:
    """Frames that make one volume, in the order of its slices. headers: of their files, by path. affine: LPS mm."""

    frames: tuple[Frame, ...]
    headers: dict[str, Header]
    affine: np.ndarray
    located: bool
    notices: tuple[Notice, ...] = ()
    part: str = ""  # tells volumes of one series from each other

    @property
    def first(self) -> Header:
        return self.headers[self.frames[0].file]

    @property
    def files(self) -> tuple[str, ...]:
        """In the order of the slices, each once."""
        return tuple(dict.fromkeys(frame.file for frame in self.frames))


def stacks(headers: Sequence[Header]) -> tuple[list[Stack], list[DataError]]:
    """The volumes that pictures' files hold, and what is left out.

    Files without a place in the patient are volumes of their own.
    """
    by_file = {header.file: header for header in headers}
    groups: dict[tuple, list[Frame]] = collections.defaultdict(list)
    for header in headers:
        for frame in header.frames:
            groups[_key(header, frame)].append(frame)
    found, problems = [], []
    for frames in groups.values():
        try:
            unique = _without_copies(frames, problems)
            parts = _parts(unique)
            for number, part in enumerate(parts):
                found.append(_stack(part, by_file, str(number) if len(parts) > 1 else ""))
        except DataError as error:
            problems.append(error)
    return found, problems


def read_stack(stack: Stack, name: str, patient: str, most: int = MAX_VOXELS) -> Volume:
    """The volume with its values. DataError when a file cannot be read, or changed since its header was."""
    first, headers = stack.first, stack.headers
    shape = (len(stack.frames), *first.size)
    check_size(first.file, shape, most)
    integral = all(header.integral for header in headers.values()) and all(
        float(x).is_integer() for frame in stack.frames for x in (frame.slope, frame.intercept)
    )
    kind = np.uint8 if first.colour else np.int16 if integral else np.float32
    values = np.empty((*shape, 3) if first.colour else shape, kind)
    wanted: dict[str, list[int]] = collections.defaultdict(list)
    for place, frame in enumerate(stack.frames):
        wanted[frame.file].append(place)
    for file, places in wanted.items():
        pixels = read_pixels(headers[file])
        for place in places:
            frame = stack.frames[place]
            plane = _in_units(pixels[frame.index], frame, values.dtype)
            values = _widened(values, plane)
            values[place] = plane
    return Volume(
        values=values.transpose(2, 1, 0, *range(3, values.ndim)),
        affine=check_affine(first.file, LPS_TO_RAS @ stack.affine),
        name=name,
        modality=first.modality,
        patient=patient,
        tone=stack.frames[len(stack.frames) // 2].tone,
        inverted=first.inverted,
        located=stack.located,
        measured=all(frame.measured for frame in stack.frames),
        files=stack.files,
        notices=stack.notices,
    )


def _in_units(pixels: np.ndarray, frame: Frame, kind: np.dtype) -> np.ndarray:
    if (frame.slope, frame.intercept) == (1.0, 0.0):
        return pixels
    if kind == np.float32:
        return pixels * frame.slope + frame.intercept
    return (
        pixels * np.int64(frame.slope) + np.int64(frame.intercept)
        if frame.slope != 1
        else pixels + np.int32(frame.intercept)
    )


def _widened(values: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """The array itself, of a longer type when integers of this plane do not fit: int16, int32, then float32."""
    if values.dtype.kind == "i":
        low, high = int(plane.min()), int(plane.max())
        for kind in (values.dtype, np.dtype(np.int32)):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return values.astype(kind, copy=False)
        return values.astype(np.float32)
    return values


def _key(header: Header, frame: Frame) -> tuple:
    """Frames with one key may lie in one volume."""
    if frame.position is None:
        return (header.file,)
    kind = (header.size, header.colour, header.inverted, header.modality)
    direction = tuple(np.round(frame.direction, 3).ravel().tolist())
    return (header.series or header.file, frame.stack, direction, tuple(np.round(frame.spacing, 4).tolist()), *kind)


def _without_copies(frames: list[Frame], problems: list[DataError]) -> list[Frame]:
    """Each DICOM object once; files that hold one again are named in `problems`."""
    seen: dict[tuple, Frame] = {}
    for frame in frames:
        kept = seen.setdefault((frame.uid or frame.file, frame.index), frame)
        if kept is not frame:
            problems.append(DataError(frame.file, None, "copy of another file's slice", "each slice once", kept.file))
    return list(seen.values())


def _parts(frames: list[Frame]) -> list[list[Frame]]:
    """Frames of one volume each: several time points (echoes, b-values, ...) of one place are taken apart."""
    doubles = _doubles(frames) if frames[0].position is not None else None
    if doubles is None:
        return [frames]
    for tag in range(len(frames[0].times)):
        parts: dict[str, list[Frame]] = collections.defaultdict(list)
        for frame in frames:
            parts[frame.times[tag][1]].append(frame)
        if len({len(part) for part in parts.values()}) == 1 and not any(map(_doubles, parts.values())):
            return list(parts.values())
    first, second = doubles
    raise DataError(
        first.file,
        None,
        "several slices lie at one place",
        "one slice, or times, echoes or b-values that tell them apart",
        second.file,
    )


def _doubles(frames: Sequence[Frame]) -> tuple[Frame, Frame] | None:
    """Two frames at one position."""
    seen: dict[tuple, Frame] = {}
    for frame in frames:
        place = tuple(np.round(frame.position, 3).tolist())
        if place in seen:
            return seen[place], frame
        seen[place] = frame
    return None


def _stack(frames: list[Frame], headers: dict[str, Header], part: str) -> Stack:
    own = {frame.file: headers[frame.file] for frame in frames}
    if frames[0].position is None:
        rows, columns = frames[0].spacing
        affine = np.diag([columns, rows, frames[0].thickness, 1.0])
        return Stack(tuple(frames), own, affine, False, part=part)
    along, down = frames[0].direction
    normal = np.cross(along, down)
    frames = sorted(frames, key=lambda frame: float(frame.position @ normal))
    step = _step(frames, normal)
    affine = np.eye(4)
    affine[:3] = np.stack([along * frames[0].spacing[1], down * frames[0].spacing[0], step, frames[0].position], axis=1)
    notices = ()
    if (aside := np.linalg.norm(step - normal * (step @ normal)) / np.linalg.norm(step)) > SHEAR:
        degrees = f"{np.degrees(np.arcsin(aside)):.2f} degrees"
        notices = (
            Notice(
                frames[0].file, None, "slices are sheared (gantry tilt)", "slices stacked along their normal", degrees
            ),
        )
    return Stack(tuple(frames), own, affine, True, notices, part)


def _step(frames: list[Frame], normal: np.ndarray) -> np.ndarray:
    """From slice to slice, mm [3]. DataError when slices are missing or not evenly spaced."""
    if len(frames) == 1:
        return normal * frames[0].thickness
    places = np.stack([frame.position for frame in frames])
    step = (places[-1] - places[0]) / (len(frames) - 1)
    heights = np.diff(places @ normal)
    usual = float(np.median(heights))
    off = np.linalg.norm(places - places[0] - np.arange(len(frames))[:, None] * step, axis=1).max()
    if off <= max(EVENNESS * usual, 1e-3):
        return step
    gap, times = int(np.argmax(heights)), heights / heights.min()
    missing = heights[gap] > 1.5 * usual and np.abs(times - np.round(times)).max() < 0.05
    what = "slices are missing" if missing else "slices are not evenly spaced"
    uneven = f"{heights.min():.3f} to {heights[gap]:.3f} mm, up to {off:.3f} mm beside an even row"
    found = f"{heights[gap]:.3f} mm before {frames[gap + 1].file}" if missing else uneven
    raise DataError(frames[0].file, None, what, f"a slice each {usual:.3f} mm", found)
