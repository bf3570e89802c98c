"""Paths as reports show them: no folder above the last ones, so that a report says nothing about whose it is."""

import re

KEPT = 3  # parts at a path's end
# An absolute path in a text: not the slashes of an address, nor of a path that is relative already.
_ABSOLUTE = re.compile(r"(?<![\w:/.~…*-])/(?:[^/\s'\",;]+/)+[^/\s'\",;]*")


def shorten(text: str) -> str:
    """The text with every absolute path cut to its last parts, `…/data/test/a.json`."""
    return _ABSOLUTE.sub(_cut, text)


def _cut(match: re.Match) -> str:
    parts = match[0].strip("/").split("/")
    return match[0] if len(parts) < KEPT else "…/" + "/".join(parts[-KEPT:])
