"""How a sweep was made: program, versions, command, machine and date, for the report's block on reproduction."""

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import medplib_jax
from medplib_jax.evaluate.result import RunEntry, SweepResult, merge, update_result

PACKAGES = ("medplib_jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "numpy", "scipy")


def note_run(workdir: str | Path, devices: str) -> None:
    """Adds this run to sweep.json. devices: on what it was computed, "8 TPU v5 lite"."""
    run = RunEntry(
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        _command(),
        commit(),
        {"python": platform.python_version()} | {name: v for name in PACKAGES if (v := _version(name))},
        f"{platform.system()} {platform.machine()}",
        devices,
    )

    def change(before: SweepResult) -> SweepResult:
        return SweepResult(**{**vars(before), "runs": merge(before.runs, [run], [run.key])})

    update_result(Path(workdir), change)


def _command() -> str:
    """As it was given; `python -m` puts the module's file in front."""
    module = (
        getattr(sys.modules["__main__"].__spec__, "name", "") if hasattr(sys.modules["__main__"], "__spec__") else ""
    )
    program = ["python", "-m", module.removesuffix(".__main__")] if module else ["python", Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Of the checkout that runs, with "-dirty" where files were changed; empty for an installed package."""
    folder = Path(medplib_jax.__file__).parents[1]
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
