"""Uploaded images and volume jobs on disk: whole or not there at all, bounded in number, size and age.

An entry is a folder with a name that nobody can guess. It is made under a name with a dot before it and renamed when
it is whole; `entry.json` in it says whose it is. What a killed server left half-made is removed at the next start.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medplib_jax.serve.refusals import Refused

ENTRY = "entry.json"
KINDS = ("images", "jobs")
_ID = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What is kept: so many entries of each kind, bytes in all, and hours after an entry was last used."""

    entries: int = 256
    bytes: int = 2**35
    hours: float = 24.0


class Store:
    """A folder that this server alone uses, readable by its user alone. Safe to use from several threads."""

    def __init__(self, folder: Path, bounds: Bounds):
        self._folder, self._bounds, self._adding = folder, bounds, threading.Lock()
        for kind in KINDS:
            (folder / kind).mkdir(parents=True, exist_ok=True, mode=0o700)
            for half in (folder / kind).glob(".*"):
                shutil.rmtree(half)
        folder.chmod(0o700)

    @contextlib.contextmanager
    def add(self, kind: str, client: str) -> Iterator[tuple[str, Path, dict[str, Any]]]:
        """A new entry: its identifier, its folder to be filled, and what is to be noted of it.

        It is there when the context ends, and nothing of it when that fails. Refused when the store is full.
        """
        name, content = secrets.token_hex(16), {}
        half = self._folder / kind / f".{name}"
        with self._adding:
            self._check_room(kind)
            half.mkdir(mode=0o700)
        try:
            yield name, half, content
            write_json(half / ENTRY, content | {"client": client})
            half.rename(self._folder / kind / name)
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)
            raise

    def path(self, kind: str, name: str, client: str) -> Path:
        """The folder of a client's entry, which counts as used now. Refused with 404 for another's, too."""
        self.entry(kind, name, client)
        return self.folder(kind, name)

    def entry(self, kind: str, name: str, client: str) -> dict[str, Any]:
        """What was noted of a client's entry; see `path`."""
        content = None
        if _ID.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):  # it may be removed at any time
                content = read_json(self.folder(kind, name) / ENTRY)
        if content is None or content["client"] != client:
            raise Refused(404, f"no such entry in {kind}")
        with contextlib.suppress(OSError):
            os.utime(self.folder(kind, name))
        return content

    def names(self, kind: str) -> list[str]:
        """Of all clients, those used longest ago first."""
        return [name for name, _ in sorted(self._used(kind), key=lambda entry: entry[1])]

    def _used(self, kind: str) -> Iterator[tuple[str, float]]:
        """Entries of all clients, each with the time of its last use."""
        for path in (self._folder / kind).iterdir():
            with contextlib.suppress(FileNotFoundError):  # it may be removed at any time
                if _ID.fullmatch(path.name):
                    yield path.name, path.stat().st_mtime

    def folder(self, kind: str, name: str) -> Path:
        """An entry's folder, whoever it belongs to."""
        return self._folder / kind / name

    def remove(self, kind: str, name: str) -> None:
        """Nothing is seen of the entry from now on."""
        gone = self._folder / kind / f".{name}"
        with contextlib.suppress(FileNotFoundError):
            (self._folder / kind / name).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def sweep(self, in_use: Mapping[str, set[str]]) -> None:
        """Removes what is older than the bounds allow, but for the names that are `in_use` by kind."""
        oldest = time.time() - 3600 * self._bounds.hours
        for kind in KINDS:
            for name, used in self._used(kind):
                if name not in in_use.get(kind, ()) and used < oldest:
                    self.remove(kind, name)

    def _check_room(self, kind: str) -> None:
        """Refused: one more entry than may be kept. Those that are being made count."""
        if len(os.listdir(self._folder / kind)) >= self._bounds.entries:
            raise Refused(429, f"the server keeps {self._bounds.entries} {kind}; delete some, or wait", retry_after=60)
        if _size(self._folder) >= self._bounds.bytes:
            raise Refused(
                429, f"the server keeps {self._bounds.bytes} bytes; delete something, or wait", retry_after=60
            )


def _size(folder: Path) -> int:
    """Bytes of all files below."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """The whole file or none of it."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)
