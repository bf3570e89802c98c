"""A folder of recorded arrays, and the registry of the checks that know what to do with its files.

A module `tests/convert/parity_*.py` adds checks with `@compares(...)`, and says in `ELSEWHERE` what its other files are
for. `tests.convert.parity` imports these modules and runs the checks whose files a folder holds."""

import dataclasses
import fnmatch
import functools
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from tests.convert.checks import Arrays, Converted, Row


class Recorded(dict):
    """The arrays of a file, which remember in `unread` those that no one looked at."""

    def __init__(self, arrays: Arrays):
        super().__init__(arrays)
        self.unread = set(arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        self.unread.discard(name)
        return super().__getitem__(name)

    def get(self, name: str, default=None):
        return self[name] if name in self else default


class MissingFixture(Exception):
    """A check needs a file that the folder does not hold."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """The folder. Its methods raise MissingFixture for what it lacks."""

    folder: pathlib.Path
    opened: dict[str, Recorded] = dataclasses.field(default_factory=dict, compare=False)  # by file

    def path(self, name: str) -> pathlib.Path:
        found = self.folder / name
        if not found.exists():
            raise MissingFixture(name)
        return found

    def arrays(self, name: str) -> Arrays:
        if name not in self.opened:
            self.opened[name] = Recorded(dict(np.load(self.path(name))))
        return self.opened[name]

    def unread(self, name: str) -> list[str]:
        """The arrays of a file that its check did not look at, and that `NOT_COMPARED` gives no reason for."""
        reasons = [pattern for file, pattern in NOT_COMPARED if fnmatch.fnmatch(name, file)]
        left = self.opened[name].unread if name in self.opened else ()
        return sorted(one for one in left if not any(fnmatch.fnmatch(one, pattern) for pattern in reasons))

    def json(self, name: str):
        return json.loads(self.path(name).read_text())

    def converted(self, *sources: str, config: str | None = None) -> Converted:
        """The checkpoint that the named files and folders are together; `config` has the config.json that none of them
        has."""
        return _converted(tuple(map(self.path, sources)), self.path(config) if config else None)


@functools.lru_cache(maxsize=2)  # several checks in a row read the same weights
def _converted(sources: tuple[pathlib.Path, ...], config: pathlib.Path | None) -> Converted:
    return Converted.load(*sources, config=config, lora_alpha=16.0)  # of all of MedPLIB's adapters


Check = Callable[[Golden, str], Iterator[Row]]
CHECKS: dict[str, Check] = {}
NOT_COMPARED: dict[tuple[str, str], str] = {}  # (pattern of files, of their arrays) -> why they are not compared
ELSEWHERE: dict[str, str] = {}  # pattern of files that have no check of their own -> where they count


def compares(*names: str, **arguments) -> Callable[[Callable], Callable]:
    """Registers a function `(golden, name, **arguments)` that yields rows for each of these files, named from the
    folder's top."""

    def register(check: Callable) -> Callable:
        repeated = [name for name in names if name in CHECKS]
        if repeated:
            raise ValueError(f"{repeated} have a check already")
        CHECKS.update({name: functools.partial(check, **arguments) for name in names})
        return check

    return register
