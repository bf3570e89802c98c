"""The checkpoints that a sweep evaluates: patterns of paths to named steps of training runs; PyTorch folders are
converted once.
"""

import dataclasses
import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
from etils import epath

import medplib_jax
from medplib_jax.checkpoint import FOLDER, complete_steps, make_manager, read_experiment, step_digest
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.data import hub
from medplib_jax.evaluate.result import CheckpointEntry, LeftOut
from medplib_jax.parallel.processes import of_process_0

log = logging.getLogger(__name__)

# The converter lies in an installed package, or beside it in a checkout.
_INSTALLED, _CHECKOUT = "medplib_jax.convert.from_torch", Path(medplib_jax.__file__).parents[1]
TORCH_FILES = ("*.safetensors", "*.bin", "*.pth")
KINDS = f"workdirs, WORKDIR/{FOLDER}/STEP or folders of PyTorch weights"


@dataclasses.dataclass(frozen=True)
class SweepCheckpoint:
    """One complete step. `path` is the path that the user gave, `workdir` the training run that holds the step (of
    PyTorch weights: their conversion).

    quantize: what is kept in 8 bits while it answers (see `decode.layout.QUANTIZE`); a part of name and run,
    so that both stand side by side.
    """

    name: str
    path: str
    workdir: str
    step: int
    kind: str  # jax or torch
    quantize: str = ""

    @property
    def run(self) -> str:
        return _quantized(epath.Path(self.path if self.kind == "torch" else self.workdir).name, self.quantize)

    @property
    def digest(self) -> str:
        """What it is, wherever it lies; see `checkpoint.step_digest`."""
        return step_digest(self.workdir, self.step)

    def experiment(self) -> ExperimentConfig:
        with make_manager(self.workdir, read_only=True) as manager:
            return read_experiment(manager, self.step)[0]

    def entry(self) -> CheckpointEntry:
        return CheckpointEntry(self.name, self.path, self.run, self.step, self.kind, self.quantize, self.digest)


def find_checkpoints(
    patterns: str, steps: str, converted: Path, quantize: str = ""
) -> tuple[list[SweepCheckpoint], list[LeftOut]]:
    """The checkpoints that comma-separated patterns mean, in their order, each once; and the folders that they name
    without a usable one.

    steps: newest or all of a workdir. converted: folder that keeps converted PyTorch weights for the next time, under a
    name made from the folder and the names, sizes and times of its files. FileNotFoundError for a pattern without a
    checkpoint, ValueError for two of one name.

    hf://OWNER/NAME@REVISION is a folder that is fetched (`data.hub`).
    """
    found: dict[tuple[str, int], tuple[str, str]] = {}
    unusable: list[LeftOut] = []
    for pattern in split_patterns(patterns):
        paths = _glob(hub.local(pattern))
        places = [(str(path), *place) for path in paths for place in _steps(path, steps, converted, unusable)]
        if not places:
            why = next((left.why for left in unusable if left.what in map(str, paths)), "found none")
            raise FileNotFoundError(f"checkpoints {pattern!r}: expected {KINDS}, {why}")
        for path, workdir, step, kind in places:
            found.setdefault((workdir, step), (path, kind))
    if not found:
        raise FileNotFoundError("no checkpoint was given (checkpoints is empty)")
    for left in unusable:
        log.warning("%s", left)
    return _named(found, quantize), unusable


def split_patterns(patterns: str) -> list[str]:
    """Comma-separated patterns of paths; a comma of a path that exists separates nothing."""
    pieces, found = patterns.split(","), []
    while pieces:
        joined = (n for n in range(len(pieces), 1, -1) if _glob(",".join(pieces[:n]).strip()))
        length = next(joined, 1)
        found.append(",".join(pieces[:length]).strip())
        pieces = pieces[length:]
    return list(filter(None, found))


def _named(found: dict[tuple[str, int], tuple[str, str]], quantize: str) -> list[SweepCheckpoint]:
    named: dict[str, SweepCheckpoint] = {}
    for (workdir, step), (path, kind) in found.items():
        name = _quantized(_name(path if kind == "torch" else workdir, step, kind), quantize)
        if name in named:
            both = f"{path} and {named[name].path}"
            raise ValueError(f"{both} would both be called {name!r}; rename one, or take two workdirs")
        named[name] = SweepCheckpoint(name, path, workdir, step, kind, quantize)
    return list(named.values())


def _glob(pattern: str) -> list[epath.Path]:
    """What a pattern names, in order of the names (numbers by value)."""
    path = epath.Path(pattern).expanduser()
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    if first is None:
        return [path] if path.exists() else []
    matches = epath.Path(*parts[:first]).glob("/".join(parts[first:]))
    return sorted(
        matches, key=lambda match: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(match))]
    )


def _steps(path: epath.Path, steps: str, converted: Path, unusable: list[LeftOut]) -> list[tuple[str, int, str]]:
    """(workdir, step, kind) of every checkpoint at a path; where there is none, why not is added to `unusable`."""
    found, why, failed = [], f"it is none of {KINDS}", False
    folder = epath.Path(path.absolute() if not str(path).startswith("gs://") else path)
    if folder.name.isdigit() and folder.parent.name == FOLDER:
        workdir, step = folder.parent.parent, int(folder.name)
        found = [(str(workdir), step, "jax")] if step in _complete_steps(workdir, "all") else []
        why, failed = "the step is not complete, or cannot be read", True
    elif (folder / FOLDER).exists():
        found = [(str(folder), step, "jax") for step in _complete_steps(folder, steps)]
        why = f"its {FOLDER!r} hold no complete step"
        failed = any(step.name.isdigit() for step in (folder / FOLDER).iterdir())
    elif folder.is_dir() and any(True for pattern in TORCH_FILES for _ in folder.glob(pattern)):
        workdir, why = _converted(Path(folder), converted)
        found = [] if why else [(str(workdir), step, "torch") for step in _complete_steps(workdir, "newest")]
        failed = True
    if not found:
        unusable.append(LeftOut(str(path), why, failed))
    return found


def _complete_steps(workdir: epath.Path, steps: str) -> list[int]:
    with make_manager(str(workdir), read_only=True) as manager:
        found = sorted(complete_steps(manager))
    return found if steps == "all" else found[-1:]


def _converted(folder: Path, converted: Path) -> tuple[epath.Path, str]:
    """The workdir of a folder's weights, and why there is none.

    Process 0 makes it, in a process of its own that needs no accelerator.
    """
    facts = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir()) if file.is_file()
    ]
    workdir = converted / f"{folder.name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"
    why = _convert(folder, workdir) if jax.process_index() == 0 and not workdir.exists() else ""
    return epath.Path(workdir), of_process_0(f"converted/{workdir.name}", why)


def _convert(folder: Path, workdir: Path) -> str:
    """Converts PyTorch weights; returns why that failed, empty if it did not."""
    log.info("converting %s", folder)
    module = "convert.from_torch" if importlib.util.find_spec("medplib_jax.convert") is None else _INSTALLED
    command = [sys.executable, "-m", module, "--source", str(folder), "--out", str(workdir)]
    paths = os.pathsep.join([str(_CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return f"it cannot be converted: {made.stderr.strip()[-2000:]}" if made.returncode else ""


def _name(path: str, step: int, kind: str) -> str:
    """A file name that depends on nothing else: the run's folder, the one above it and the step; of PyTorch weights
    their folder.
    """
    parts = [re.sub(r"[^\w.]+", "_", part).strip("_") for part in epath.Path(path).parts]
    return parts[-1] if kind == "torch" else "-".join([*filter(None, parts[-2:]), str(step)])


def _quantized(name: str, quantize: str) -> str:
    return f"{name}-{quantize}" if quantize else name
