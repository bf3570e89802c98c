"""The folders that builders write.

Safe names, whole files, links in place of copies, and nothing that an earlier run left. A builder makes every file
again, so that no result of another source, option or version of the code stays. `made.txt` lists what it made: files
that the latest run did not make are removed, and files of anybody else are never touched. So a second run equals a run
into an empty folder, or is refused.
"""

import collections
import contextlib
import filecmp
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medplib_jax.data.cache import fingerprint
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.data.records import find_file

LIST = "made.txt"
UNUSED = "file is not used"
_OWN = (LIST, "manifest.json", "skipped.jsonl")  # what a builder tells about the folder that it made
_UNSAFE = re.compile(r"[^\w.+()'%=,-]+")


def safe_name(name: str) -> str:
    """One file name without folders, white space, or signs that have a meaning in annotation files."""
    return _UNSAFE.sub("-", re.sub(r"\s+", "_", name.strip().replace("/", "--"))).lstrip(".-") or "unnamed"


def files_below(root: str) -> list[str]:
    """Files below the folder, relative to it with "/", sorted.

    Hidden files (.DS_Store) and Windows' Thumbs.db belong to no dataset.
    """
    found = []
    for place, folders, names in os.walk(root, followlinks=True):
        if LIST in names and place != root:  # what a builder made in its own source
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_up(place, name)]
        below = os.path.relpath(place, root)
        found += [
            os.path.normpath(os.path.join(below, name)).replace(os.sep, "/")
            for name in names
            if not name.startswith(".") and name != "Thumbs.db"
        ]
    return sorted(found)


def _leads_up(place: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in, where a walk would never end."""
    target = os.path.realpath(os.path.join(place, name))
    return os.path.commonpath([target, os.path.realpath(place)]) == target


def unused(root: str, names: Iterable[str], expected: str) -> list[DataError]:
    """A problem for each file of a source that nothing was made of; names are relative to it."""
    return [DataError(os.path.join(root, name), None, UNUSED, expected, name) for name in names if name not in _OWN]


def write_json(path: str, value: Any) -> None:
    """Writes the whole file or none of it."""
    replace(path, json.dumps(value, indent=1).encode())


def age_of(root: str, reference: str) -> list[int] | None:
    """Size and time of the file that a reference names, which change with its content; None when it is not there."""
    try:
        return list(fingerprint(find_file(root, reference))[1:])
    except DataError:
        return None


@functools.cache
def code_version() -> str:
    """Changes with the code of `data` and `datasets`: what is kept of an earlier run must come from the same code."""
    package = Path(__file__).parents[1]
    files = sorted(file for folder in ("data", "datasets") for file in (package / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


class Folder:
    """The folder that one builder makes of one source.

    As a context manager: removes what earlier runs made and this one did not.

    Worker processes may write to copies of it. After an exception everything stays as it was written, and the next run
    cleans up.
    """

    def __init__(self, path: str, command: str, *sources: str):
        """DataError when the folder holds what another command made, or this one of other sources."""
        maker = " ".join(
            [command, *(os.path.relpath(os.path.realpath(one), os.path.realpath(path)) for one in sources)]
        )
        self.path, self._run = path, f"# {uuid.uuid4().hex}"
        self.claimed: list[str] = []  # by this copy of the folder
        self._list = os.path.join(path, LIST)
        lines = _lines(self._list)
        if lines and lines[0] != f"# {maker}":
            raise DataError(path, None, "folder holds what another command made", maker, lines[0].removeprefix("# "))
        os.makedirs(path, exist_ok=True)
        self._append(*([] if lines else [f"# {maker}"]), self._run)

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is not None:
            return
        lines = _lines(self._list)
        start = lines.index(self._run)
        made = {name for name in lines[start + 1 :] if os.path.isfile(self._target(name))}
        for name in sorted({name for name in lines[:start] if not name.startswith("#")} - made):
            self._remove(name)
        replace(self._list, "\n".join([lines[0], *sorted(made), ""]).encode())

    def write(self, name: str, content: bytes) -> None:
        """Writes the whole file `name` or none of it. DataError for a file that this builder did not make."""
        replace(self.claim(name), content)

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.claim(name), value)

    def write_lines(self, name: str, lines: Iterable[str]) -> None:
        self.write(name, "".join(f"{line}\n" for line in lines).encode())

    def write_problems(self, problems: Sequence[DataError]) -> dict[str, Any]:
        """Writes skipped.jsonl, and returns what a manifest says of them: how many were left out and noted, and why."""
        self.write_lines("skipped.jsonl", (json.dumps(problem.as_dict()) for problem in problems))
        noted = [problem for problem in problems if isinstance(problem, Notice)]
        reasons = collections.Counter(problem.what for problem in problems if not isinstance(problem, Notice))
        found = {"skipped": len(problems) - len(noted), "reasons": dict(reasons.most_common())}
        return found | ({"noted": dict(collections.Counter(one.what for one in noted).most_common())} if noted else {})

    def link(self, source: str, name: str) -> None:
        """Makes the file `source` the file `name`, too: a hard link, or a copy on another disk."""
        target = self.claim(name)
        if os.path.exists(target) and (os.path.samefile(source, target) or _is_equal(source, target)):
            return
        with _partial(target) as partial:
            try:
                os.link(source, partial)
            except OSError:  # another disk, or one without links
                shutil.copyfile(source, partial)

    def claim(self, name: str) -> str:
        """The path of a file that is about to be written, noted as this builder's. DataError for a file of others."""
        target = self._target(name)
        if os.path.lexists(target) and name not in _known(self._list, self._run) and name not in _lines(self._list):
            what = "file is there already and was not made by this command"
            raise DataError(target, None, what, "another --out, or this file removed", "a file that is not in " + LIST)
        self._append(name)
        self.claimed.append(name)
        return target

    def keep(self, names: Iterable[str]) -> None:
        """These files of an earlier run are as this one would make them."""
        self._append(*names)

    def discard(self, names: Iterable[str]) -> None:
        """Removes files of this run, which turned out to be of no use."""
        for name in names:
            self._remove(name)

    def clear(self, below: str) -> None:
        """Removes what was made below this folder, before it is made again."""
        self.discard(name for name in _lines(self._list) if name.startswith(f"{below}/"))

    def _target(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _append(self, *lines: str) -> None:
        """In one call, so that lines of several processes do not mix."""
        with open(self._list, "ab", buffering=0) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())

    def _remove(self, name: str) -> None:
        """Removes the file and the folders that it leaves empty; nothing outside the folder, whatever the list says."""
        root, target = os.path.realpath(self.path), os.path.realpath(os.path.dirname(self._target(name)))
        if os.path.commonpath([root, target]) != root or not os.path.lexists(self._target(name)):
            return
        os.unlink(self._target(name))
        while target != root and not os.listdir(target):
            os.rmdir(target)
            target = os.path.dirname(target)


@functools.lru_cache(maxsize=1)
def _known(path: str, run: str) -> frozenset[str]:
    """Files of a list, read once for each run and process."""
    return frozenset(_lines(path))


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def _is_equal(first: str, second: str) -> bool:
    """Whether two files have the same content, whatever their age."""
    filecmp.clear_cache()
    return filecmp.cmp(first, second, shallow=False)


def replace(path: str, content: bytes) -> None:
    """Writes the whole file or none of it. One of this content stays as it is, and as old."""
    if os.path.isfile(path) and os.path.getsize(path) == len(content) and Path(path).read_bytes() == content:
        return
    with _partial(path) as partial, open(partial, "wb") as file:
        file.write(content)


@contextlib.contextmanager
def _partial(path: str) -> Iterator[str]:
    """A path beside the file that becomes the file in the end."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
