"""Annotation files in MeCoVQA's form, record by record. A record that cannot be used is a `DataError`, never a silent guess."""

import dataclasses
import json
import os
import re

from medplib_jax.data.errors import DataError

MASK = re.compile(r"<mask>(.*?)</mask>")
REGION = re.compile(r"<region>(.*?)</region>")
ROLES = ("human", "gpt")


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation about one image (or several, or none). References are as written in the file, relative to `root`."""

    file: str  # the annotation file, for messages
    index: int
    root: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]  # (role, text); roles alternate, the first is human
    answer_type: str = ""  # open, closed or empty

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

    @property
    def modality(self) -> str:
        return modality(self.images[0]) if self.images else ""


def find_file(root: str, reference: str) -> str:
    """The real path of the file that a reference names, looked up below `root`; a missing ".png" is tried.

    DataError when it is missing or lies (through a link, too) outside the root.
    """
    if "\0" in reference:
        raise DataError(root, None, "not a path", "no zero byte", repr(reference))
    root = os.path.realpath(root)
    joined = os.path.join(root, reference)
    path = joined if os.path.isfile(joined) else joined + ".png"
    real = os.path.realpath(path)
    if os.path.commonpath([root, real]) != root:
        raise DataError(root, None, "path leaves the data folder", f"a file below {root}", reference)
    if not os.path.isfile(real):
        raise DataError(root, None, "file is missing", joined, "no such file")
    return real


def modality(image: str) -> str:
    """Imaging modality from a file name: the text before "_00--", else before the first "_". x and x_ray are both "x_ray"."""
    name = os.path.basename(image)
    prefix = name.split("_00--")[0] if "_00--" in name else name.split("_")[0]
    return "x_ray" if prefix == "x" else prefix


class MecovqaSource:
    """Records of one JSON file: a list of {"image", "conversations": [{"from", "value"}, ...], "answer_type"}.

    "image" may be a list (several `<image>` in the text) or absent. `root` is where its paths start; the file's folder by default.
    """

    def __init__(self, json_path: str, root: str | None = None):
        self.file, self.root = json_path, root or os.path.dirname(os.path.abspath(json_path))
        try:
            with open(json_path, encoding="utf-8") as file:
                self._records = json.load(file)
        except (OSError, ValueError) as error:
            raise DataError(json_path, None, "annotation file cannot be read", "a JSON list of records", str(error)) from error
        if not isinstance(self._records, list):
            raise DataError(json_path, None, "not a list of records", "a JSON list", type(self._records).__name__)

    def __reduce__(self):
        return MecovqaSource, (self.file, self.root)  # worker processes read the file themselves

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return parse_record(self._records[index], self.file, index, self.root)


def parse_record(raw: dict, file: str, index: int, root: str) -> Record:
    """A checked `Record`, or DataError. Files that it refers to are not opened here."""

    def fail(what, expected="", found=""):
        raise DataError(file, index, what, expected, found)

    if not isinstance(raw, dict):
        fail("not a record", "an object", type(raw).__name__)
    conversations = raw.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        fail("record without conversations", "a list of turns", repr(conversations))
    images = raw.get("image") or ()
    images = tuple(images) if isinstance(images, list | tuple) else (images,)
    if not all(isinstance(image, str) and image for image in images):
        fail("image is not a path", "a path or a list of paths", repr(raw["image"]))

    turns = []
    for turn in conversations:
        role, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES:
            fail("unknown role", " or ".join(ROLES), repr(role))
        if not isinstance(value, str | int | float):
            fail("turn without text", "a string", repr(value))
        turns.append((role, str(value)))
    if turns[0][0] == "gpt":  # a greeting before the first question, which the original leaves out, too
        turns = turns[1:]
    for position, (role, text) in enumerate(turns):
        if role != ROLES[position % 2]:
            fail("roles do not alternate", f"{ROLES[position % 2]} in turn {position}", role)
        _check_turn(role, text, fail)
    if not turns:
        fail("record without a question", "a human turn", "none")
    return Record(file, index, root, images, tuple(turns), str(raw.get("answer_type", "")))


def _check_turn(role: str, text: str, fail) -> None:
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
