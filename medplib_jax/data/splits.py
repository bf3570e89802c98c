"""Which files of a folder hold records, and which of them are for evaluation, told by name and first bytes."""

import os
import re

_HELD_OUT = re.compile(r"(?<![a-z])(test|val|valid|validation|zeroshot)(?![a-z])")
_SUFFIXES = (".json", ".jsonl")
_BEGINNING = 2**16  # bytes


def is_held_out(name: str) -> bool:
    """Whether a file or split of this name is for evaluation: test, val or zeroshot stands in it as a word."""
    return bool(_HELD_OUT.search(name.lower()))


def annotation_files(folder: str, deep: bool = False) -> tuple[list[str], list[str]]:
    """The folder's files of records, and its JSON files of other kinds; paths, both sorted.

    deep: those of its subfolders, too. The second list is for messages: class names, manifests, or records in a form
    that is not read.
    """
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        names = [name for name in names if name.lower().endswith(_SUFFIXES) and not name.startswith(".")]
        found += [os.path.join(place, name) for name in names]
    used = [path for path in sorted(found) if may_hold_records(path)]
    return used, sorted(set(found) - set(used))


def may_hold_records(path: str) -> bool:
    """Whether a file begins like records: a JSON list, or JSON lines with conversations.

    Class names, manifests and the like do not.
    """
    with open(path, "rb") as file:
        beginning = file.read(_BEGINNING).removeprefix(b"\xef\xbb\xbf").lstrip()
    first_line = beginning.split(b"\n", 1)[0]
    return beginning[:1] == b"[" or (path.lower().endswith(".jsonl") and b'"conversations"' in first_line)
