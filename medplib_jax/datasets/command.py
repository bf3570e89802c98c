"""What the builders' command lines have in common."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from medplib_jax.datasets.processes import Workers


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


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The options of who makes the shards; read by `workers_of`."""
    parser.add_argument("--workers", type=int, help="processes of this machine; one for each core, 0: this one only")
    add_beam(parser)


def add_beam(parser: argparse.ArgumentParser) -> None:
    """As `add_workers`, where this process alone does the work otherwise."""
    parser.add_argument(
        "--beam_runner", default="", help="shards are made by Apache Beam: DirectRunner, FlinkRunner, DataflowRunner"
    )
    parser.add_argument(
        "--beam_options", default="", help="for Beam, as one argument: --beam_options='--direct_num_workers=4'"
    )


def workers_of(arguments: argparse.Namespace) -> Workers:
    """ValueError where Beam cannot be used as it is asked for."""
    here = None if arguments.beam_runner else 0
    return Workers(
        vars(arguments).get("workers", here), arguments.beam_runner, tuple(shlex.split(arguments.beam_options))
    )


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
