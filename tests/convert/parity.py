"""Converted weights against what the original programs computed: one table of the largest relative errors.

python -m tests.convert.parity --golden DIR [--only PATTERN]

Every recorded file of DIR that a check knows is compared. Files that no check knows are named. Ends 1 when an error
exceeds its bar, a check fails, or nothing was compared."""

import argparse
import fnmatch
import importlib
import pathlib
import pkgutil
import re
import sys
import time
from collections.abc import Iterator, Sequence

import jax

from tests.convert.checks import summarise
from tests.convert.golden_folder import CHECKS, ELSEWHERE, NOT_COMPARED, Golden, MissingFixture


def load_checks() -> None:
    """Imports every module beside this one whose name begins with `parity_`; they register their checks."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("parity_"):
            importlib.import_module(f"{__package__}.{module.name}")


def run_check(golden: Golden, name: str) -> bool:
    """Prints the rows of one file; True when all are within their bars. MissingFixture when the folder lacks what they
    need."""
    start, passed = time.time(), True
    for row in summarise(CHECKS[name](golden, name)):
        passed &= row.error <= row.bar
        verdict = "ok" if row.error <= row.bar else "FAILED"
        print(f"| {name} | {row.what} | {row.error:.1e} | {row.bar:.0e} | {verdict} |", flush=True)
    for line in not_compared(golden, name):
        print(f"| {name} | {line} | | | |", flush=True)
    print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr)
    golden.opened.clear()
    jax.clear_caches()  # compiled programs of all fixtures together are gigabytes
    return passed


def not_compared(golden: Golden, name: str) -> Iterator[str]:
    """What a check left out of a file: with the reason, or by name where there is none."""
    for (file, pattern), why in NOT_COMPARED.items():
        known = fnmatch.filter(golden.opened[name].unread, pattern) if name in golden.opened else file == name
        if known and fnmatch.fnmatch(name, file):
            yield f"{pattern}: {why}"
    if names := golden.unread(name):
        yield f"not compared: {', '.join(names)}"


def compare(folder: pathlib.Path, only: str = "") -> int:
    """Prints the table of a folder; returns how many files were compared well, or -1 when one was not."""
    golden, compared, failed = Golden(folder), 0, 0
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    print("| file | what | largest relative error | bar | |\n|---|---|---|---|---|")
    for name in (name for name in files if re.search(only, name)):
        if name not in CHECKS:
            where = next((where for pattern, where in ELSEWHERE.items() if fnmatch.fnmatch(name, pattern)), None)
            print(f"| {name} | {where or 'not compared: no check knows it'} | | | |")
            continue
        try:
            good = run_check(golden, name)
        except MissingFixture as missing:
            print(f"| {name} | not compared: it needs {missing}, which is not here | | | |")
            continue
        except Exception as error:  # the others are compared all the same
            print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:200]} | | | FAILED |")
            good = False
        compared, failed = compared + 1, failed + (not good)
    print(f"{compared} files compared, {failed} failed")
    return -1 if failed else compared


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", required=True, type=pathlib.Path)
    parser.add_argument("--only", default="", help="regular expression of file names")
    arguments = parser.parse_args(argv)
    if not arguments.golden.is_dir():
        parser.error(f"--golden {arguments.golden}: no such folder")
    load_checks()
    raise SystemExit(0 if compare(arguments.golden, arguments.only) > 0 else 1)


if __name__ == "__main__":
    main()
