"""What the builders' command lines have in common."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line; a value may begin with a minus, as in `--window -600,1500`."""
    joined: list[str] = []
    for argument in sys.argv[1:] if arguments is None else arguments:
        if joined and re.match(r"-[\d.]", argument) and re.fullmatch(r"--[\w-]+", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return parser.parse_args(joined)


def window(text: str) -> tuple[float, float]:
    """Type of the option --window: "40,400" is (centre, width)."""
    try:
        centre, width = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected CENTRE,WIDTH such as 40,400, found {text!r}") from error
    if not width > 0:
        raise argparse.ArgumentTypeError(f"expected a width above 0, found {width:g}")
    return centre, width


def finish(make: Callable[[], dict[str, Any]]) -> int:
    """Prints the manifest that `make` returns, or in one line what is wrong with its input; the exit status.

    What the manifest's "notices" say is printed, too, beside what was left out.
    """
    try:
        manifest = make()
    except (ValueError, RuntimeError, OSError) as error:  # DataError among them
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(manifest, indent=1))
    for notice in manifest.get("notices", ()):
        print(notice, file=sys.stderr)
    return 0
