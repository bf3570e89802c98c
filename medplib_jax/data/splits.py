"""Which files hold records, and which of them are for evaluation, told by name and first bytes."""

import re

_HELD_OUT = re.compile(r"(?<![a-z])(test|val|valid|validation|zeroshot)(?![a-z])")


def is_held_out(name: str) -> bool:
    """Whether a file or split of this name is for evaluation: test, val or zeroshot stands in it as a word."""
    return bool(_HELD_OUT.search(name.lower()))


def may_hold_records(path: str) -> bool:
    """Whether a file begins like records: a JSON list, or JSON lines with conversations. Class names, manifests and the like do not."""
    with open(path, "rb") as file:
        return b'"conversations"' in file.readline() if path.endswith(".jsonl") else file.read(64).lstrip()[:1] == b"["
