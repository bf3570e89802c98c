"""One record in MeCoVQA's form, or Med-GRIT's: a conversation about images, with references to masks and regions.

A record that cannot be used is a `DataError`, never a silent guess.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from medplib_jax.data.errors import DataError
from medplib_jax.data.icl_form import is_icl, plain_form
from medplib_jax.data.images import Blob
from medplib_jax.data.regions import is_shape

MASK = re.compile(r"<mask>(.*?)</mask>")
REGION = re.compile(r"<region>(.*?)</region>")
REF = re.compile(r"<ref>(.*?)</ref>")
ROLES = ("human", "gpt")
ANSWER_TYPES = {  # as people write them, without case, spaces, hyphens and underscores -> as a `Record` has them
    **dict.fromkeys(("", "unknown", "none"), ""),
    **dict.fromkeys(("open", "openended", "free", "freeform", "freetext", "other", "number"), "open"),
    **dict.fromkeys(("closed", "close", "closedended", "yes/no", "yesno", "binary", "choice"), "closed"),
    **dict.fromkeys(("multichoice", "multiplechoice", "mcq"), "closed"),
}
LONGEST_STEP = 1e4  # mm from pixel to pixel, as of scans
PICTURE = re.compile(r"(?:Picture \d+:\s*)?<img>(.*?)</img>\n?")  # of Med-GRIT


@dataclasses.dataclass(frozen=True)
class VolumeSlice:
    """Which slice of a volume a record's image is: number `slice` of `slices`.

    spacing: mm between slices, rows and columns of the picture, whose size is (h, w).
    """

    name: str
    slice: int
    slices: int
    spacing: tuple[float, float, float]
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation about one image (or several, or none).

    References are as written in the file, relative to `root`.
    """

    file: str  # the annotation file, for messages
    index: int
    root: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]  # (role, text); roles alternate, the first is human
    answer_type: str = ""  # open, closed or empty
    patient: str = ""  # whose images these are, where the file says it
    structure: str = ""  # what is asked about: what the file says, else the only <ref> of the last question
    examples: tuple[tuple[str, str], ...] | None = None  # (image, mask) shown before the images; see `icl`
    target_mask: str | None = None  # of the image in question, where examples show what is sought
    volume: VolumeSlice | None = None  # whose slice the image is, where the file says it
    spacing: tuple[float, float] | None = None  # mm between rows and between columns of the last image, where known
    contents: Mapping[str, bytes] | None = dataclasses.field(
        default=None, repr=False
    )  # of the references, where they are no files

    @property
    def references(self) -> tuple[str, ...]:
        """The files that it names, each once.

        Its images, those of its examples, and the regions and masks of its text; not what is drawn in words.
        """
        named = (name.strip() for _, text in self.turns for found in (REGION, MASK) for name in found.findall(text))
        shown = (name for example in self.examples or () for name in example)
        return tuple(dict.fromkeys([*self.images, *(name for name in named if not is_shape(name)), *shown]))

    def error(self, what: str, expected: str = "", found: str = "") -> DataError:
        return DataError(self.file, self.index, what, expected, found)

    def path(self, reference: str) -> str:
        """The file that a reference names. DataError when it is missing or lies (through a link, too) outside the root.

        Some of MeCoVQA's references lack their ".png"; it is tried.
        """
        try:
            return find_file(self.root, reference)
        except DataError as error:
            raise self.error(error.what, error.expected, error.found) from error

    def find(self, reference: str) -> str | Blob:
        """What `images` can open: the reference's file (see `path`) or its content, where the source carries it."""
        if self.contents is None:
            return self.path(reference)
        if reference not in self.contents:
            raise self.error("file is missing", reference, "not in the dataset")
        return Blob(f"{self.root}/{reference}", self.contents[reference])

    @property
    def modality(self) -> str:
        return modality(self.images[0]) if self.images else ""


def find_file(root: str, reference: str) -> str:
    """The real path of the file that a reference names, looked up below `root`; a missing ".png" is tried.

    DataError when it is missing or lies (through a link, too) outside the root; images/ and masks/ may be links
    themselves.
    """
    if "\0" in reference:
        raise DataError(root, None, "not a path", "no zero byte", repr(reference))
    root, *others = _real_roots(root)
    joined = os.path.join(root, reference)
    path = joined if os.path.isfile(joined) else joined + ".png"
    real = os.path.realpath(path)
    if not any(os.path.commonpath([one, real]) == one for one in (root, *others)):
        raise DataError(root, None, "path leaves the data folder", f"a file below {root}", reference)
    if not os.path.isfile(real):
        raise DataError(root, None, "file is missing", joined, "no such file")
    return real


@functools.lru_cache(maxsize=64)
def _real_roots(root: str) -> tuple[str, ...]:
    """Where files may lie.

    The folder, and its images/, masks/ and masks_merged/ where these are links to folders elsewhere.
    """
    linked = (os.path.join(root, name) for name in ("images", "masks", "masks_merged"))
    return os.path.realpath(root), *(os.path.realpath(path) for path in linked if os.path.islink(path))


def modality(image: str) -> str:
    """Imaging modality from a file name: the text before "_00--", else before the first "_".

    x and x_ray are both "x_ray".
    """
    name = os.path.splitext(os.path.basename(image))[0]
    prefix = name.split("_00--")[0] if "_00--" in name else name.split("_")[0]
    return "x_ray" if prefix == "x" else prefix


def parse_record(raw: dict, file: str, index: int, root: str) -> Record:
    """A checked `Record`, or DataError. Files that it refers to are not opened here."""

    def fail(what: str, expected: str = "", found: str = "") -> NoReturn:
        raise DataError(file, index, what, expected, found)

    if not isinstance(raw, dict):
        fail("not a record", "an object", type(raw).__name__)
    raw = plain_form(raw, fail) if is_icl(raw) else _from_pairs(raw)
    conversations = raw.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        fail("record without conversations", "a list of turns", repr(conversations))
    images = raw.get("image")
    images = () if images is None else tuple(images) if isinstance(images, list | tuple) else (images,)
    if not all(isinstance(image, str) and image and _is_unicode(image) for image in images):
        fail("image is not a path", "a path or a list of paths", repr(raw["image"]))

    turns = []
    for turn in conversations:
        role, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES:
            fail("unknown role", " or ".join(ROLES), repr(role))
        if not isinstance(value, str | int | float) or isinstance(value, bool) or value != value:
            fail("turn without text", "a string", repr(value))
        if not _is_unicode(str(value)):
            fail("text is not Unicode", "no half of a surrogate pair", ascii(value))
        turns.append((role, str(value)))
    if turns[0][0] == "gpt":  # a greeting before the first question, which the original leaves out, too
        turns = turns[1:]
    for position, (role, text) in enumerate(turns):
        if role != ROLES[position % 2]:
            fail("roles do not alternate", f"{ROLES[position % 2]} in turn {position}", role)
        _check_turn(role, text, fail)
    if not turns:
        fail("record without a question", "a human turn", "none")
    written = raw.get("answer_type")
    answer_type = ANSWER_TYPES.get(re.sub(r"[\s_-]", "", written.lower())) if isinstance(written, str) else None
    if answer_type is None and written is not None:
        fail("unknown answer type", "open, closed, or another name of them", repr(written))
    patient = "" if raw.get("patient") is None else str(raw["patient"])
    told = raw.get("structure")
    structure = told if isinstance(told, str) else _named(turns)
    shown = {name: raw[name] for name in ("examples", "target_mask")} if is_icl(raw) else {}
    volume = None if raw.get("volume") is None else _volume(raw["volume"], fail)
    of_slice = volume.spacing[1:] if volume else None
    spacing = of_slice if raw.get("spacing") is None else read_spacing(raw["spacing"], fail)
    if of_slice and spacing != of_slice:
        fail("spacing is not that of the volume's rows and columns", repr(of_slice), repr(spacing))
    text = {"answer_type": answer_type or "", "patient": patient, "structure": structure.strip()}
    return Record(file, index, root, images, tuple(turns), **text, **shown, volume=volume, spacing=spacing)


def read_spacing(raw: Any, fail: Callable[..., NoReturn]) -> tuple[float, float]:
    """(mm between rows, mm between columns) of a picture. `fail` is called for anything else."""
    numbers = raw if isinstance(raw, list | tuple) and len(raw) == 2 else ()
    known = [float(x) for x in numbers if type(x) in (int, float) and 0 < x < LONGEST_STEP]
    if len(known) != 2:
        expected = f"[mm between rows, mm between columns], both above 0 and below {LONGEST_STEP:g}"
        fail("spacing cannot be used", expected, repr(raw)[:200])
    return known[0], known[1]


def _volume(raw: Any, fail: Callable[..., NoReturn]) -> VolumeSlice:
    try:
        apart, down, right = map(float, raw["spacing"])
        height, width = map(int, raw["size"])
        where = str(raw["name"]), int(raw["slice"]), int(raw["slices"])
    except (TypeError, KeyError, ValueError, OverflowError):
        fail("volume cannot be read", "name, slice, slices, spacing of 3 and size of 2 numbers", repr(raw)[:200])
    found = VolumeSlice(*where, (apart, down, right), (height, width))
    if not all(0 < measure < math.inf for measure in (*found.spacing, *found.size)):
        fail("volume cannot be read", "spacing and size above 0", repr(raw)[:200])
    if not 0 <= found.slice < found.slices:
        fail("volume has no such slice", f"0 to {found.slices - 1}", str(found.slice))
    return found


def _named(turns: Sequence[tuple[str, str]]) -> str:
    questions = [text for role, text in turns if role == "human"]
    names = REF.findall(questions[-1]) if questions else []
    return names[0] if len(names) == 1 else ""


def _from_pairs(raw: dict) -> dict:
    """Med-GRIT's form, {"conversations": [[question, answer], ...]} with `Picture 1: <img>path</img>` in the questions,
    as MeCoVQA's; a record of another form as it is."""
    pairs = raw.get("conversations")
    if not isinstance(pairs, list) or not pairs or not all(map(_is_pair, pairs)):
        return raw
    images = [path for question, _ in pairs for path in PICTURE.findall(question)]
    turns = [
        {"from": role, "value": PICTURE.sub(_image_mark, text)}
        for pair in pairs
        for role, text in zip(ROLES, pair, strict=True)
    ]
    return raw | {"image": images or None, "conversations": turns}


def _is_pair(turn) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _image_mark(match: re.Match) -> str:
    return "<image>\n" if match[0].startswith("Picture") else "<image>"


def _is_unicode(text: str) -> bool:
    """False for what JSON can write with escapes and UTF-8 cannot: half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def check_complete(record: Record) -> None:
    """DataError when the conversation has no answer, or its `<image>` do not pair up with its images."""
    if record.turns[-1][0] != "gpt":
        raise record.error("conversation without an answer", "a gpt turn at the end", record.turns[-1][1])
    check_images(record)


def check_images(record: Record) -> None:
    """DataError when there are not as many `<image>` as images; those of examples are counted by `icl.spelled_out`."""
    if record.examples is not None:
        return
    named = sum(text.count("<image>") for _, text in record.turns)
    if named != len(record.images):
        raise record.error("images and <image> do not pair up", f"{len(record.images)} <image>", str(named))


def _check_turn(role: str, text: str, fail: Callable[..., NoReturn]) -> None:
    for pattern, tag in ((MASK, "mask"), (REGION, "region")):
        if not len(pattern.findall(text)) == text.count(f"<{tag}>") == text.count(f"</{tag}>"):
            fail(f"<{tag}> is not closed", f"<{tag}>...</{tag}>", text)
    masks, segs = len(MASK.findall(text)), text.count("<SEG>")
    if role == "human" and masks:
        fail("mask in a question", "masks in answers only", text)
    if role == "gpt" and "<image>" in text:
        fail("image in an answer", "<image> in questions only", text)
    if role == "gpt" and masks != segs:
        fail("<SEG> and masks do not pair up", f"{segs} <mask> for {segs} <SEG>", str(masks))
    if not MASK.sub("", text).strip():
        fail("empty answer" if role == "gpt" else "empty question", "some text", repr(text))
    if any(not reference.strip() for reference in REGION.findall(text) + MASK.findall(text)):
        fail("region or mask without a reference", "a path or coordinates", repr(text))
