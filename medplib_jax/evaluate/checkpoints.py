"""The checkpoints that a sweep evaluates: patterns of paths to named steps of training runs; PyTorch folders are converted once."""

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
from medplib_jax.checkpoint import FOLDER, complete_steps, make_manager, read_experiment
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.parallel.processes import wait_for_others

log = logging.getLogger(__name__)

# The converter lies in an installed package, or beside it in a checkout.
_INSTALLED, _CHECKOUT = "medplib_jax.convert.from_torch", Path(medplib_jax.__file__).parents[1]
TORCH_FILES = ("*.safetensors", "*.bin", "*.pth")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One complete step. `path` is what was asked for, `workdir` where the step lies (of PyTorch weights: converted).

    quantize: how its weights are kept while it answers, see `decode_layout.decoding_model`; a part of name and run, so that both stand side by side.
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
    def written(self) -> int:
        """Tells a run that was started anew in the same folder from the one before."""
        return int((epath.Path(self.workdir) / FOLDER / str(self.step) / "state").stat().mtime)

    def experiment(self) -> ExperimentConfig:
        with make_manager(self.workdir, read_only=True) as manager:
            return read_experiment(manager, self.step)[0]

    def as_dict(self) -> dict:
        return {
            "name": self.name,
            "path": self.path,
            "run": self.run,
            "step": self.step,
            "kind": self.kind,
            "quantize": self.quantize,
        }


def find_checkpoints(patterns: str, steps: str, converted: Path, quantize: str = "") -> list[Checkpoint]:
    """The checkpoints that comma-separated patterns mean, in their order, each once.

    steps: newest or all of a workdir. converted: folder that keeps converted PyTorch weights for the next time, under a name made from
    the folder and the names, sizes and times of its files. FileNotFoundError for a pattern without a checkpoint, ValueError for two of one name.
    """
    found: dict[tuple[str, int], tuple[str, str]] = {}
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        places = [(str(path), *place) for path in _glob(pattern) for place in _steps(path, steps, converted)]
        if not places:
            raise FileNotFoundError(
                f"checkpoints {pattern!r}: expected workdirs, WORKDIR/{FOLDER}/STEP or folders of PyTorch weights, found none"
            )
        for path, workdir, step, kind in places:
            found.setdefault((workdir, step), (path, kind))
    if not found:
        raise FileNotFoundError("no checkpoint was given (checkpoints is empty)")
    named: dict[str, Checkpoint] = {}
    for (workdir, step), (path, kind) in found.items():
        name = _quantized(_name(path if kind == "torch" else workdir, step, kind), quantize)
        checkpoint = Checkpoint(name, path, workdir, step, kind, quantize)
        if checkpoint.name in named:
            raise ValueError(
                f"{path} and {named[checkpoint.name].path} would both be called {checkpoint.name!r}; rename one, or take two workdirs"
            )
        named[checkpoint.name] = checkpoint
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


def _steps(path: epath.Path, steps: str, converted: Path) -> list[tuple[str, int, str]]:
    """(workdir, step, kind) of every checkpoint at a path; empty when it is none."""
    if not path.is_dir():
        return []
    path = epath.Path(path.absolute() if not str(path).startswith("gs://") else path)
    if path.name.isdigit() and path.parent.name == FOLDER:
        workdir, step = path.parent.parent, int(path.name)
        return [(str(workdir), step, "jax")] if step in _complete_steps(workdir, "all") else []
    if (path / FOLDER).exists():
        return [(str(path), step, "jax") for step in _complete_steps(path, steps)]
    if any(True for pattern in TORCH_FILES for _ in path.glob(pattern)):
        workdir = _converted(Path(path), converted)
        return [(str(workdir), step, "torch") for step in _complete_steps(epath.Path(workdir), "newest")]
    return []


def _complete_steps(workdir: epath.Path, steps: str) -> list[int]:
    with make_manager(str(workdir), read_only=True) as manager:
        found = sorted(complete_steps(manager))
    return found if steps == "all" else found[-1:]


def _converted(folder: Path, converted: Path) -> Path:
    """The workdir of a folder's weights. When it is not there, process 0 makes it, in a process of its own that needs no accelerator."""
    facts = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir()) if file.is_file()
    ]
    workdir = converted / f"{folder.name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"
    if jax.process_index() == 0 and not workdir.exists():
        log.info("converting %s", folder)
        module = "convert.from_torch" if importlib.util.find_spec("medplib_jax.convert") is None else _INSTALLED
        command = [sys.executable, "-m", module, "--source", str(folder), "--out", str(workdir)]
        paths = os.pathsep.join([str(_CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
        made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if made.returncode:
            raise ValueError(f"{folder}: cannot be converted: {made.stderr.strip()[-2000:]}")
    wait_for_others(f"converted/{workdir.name}")
    return workdir


def _name(path: str, step: int, kind: str) -> str:
    """A file name that depends on nothing else: the run's folder, the one above it and the step; of PyTorch weights their folder."""
    parts = [re.sub(r"[^\w.]+", "_", part).strip("_") for part in epath.Path(path).parts]
    return parts[-1] if kind == "torch" else "-".join([*filter(None, parts[-2:]), str(step)])


def _quantized(name: str, quantize: str) -> str:
    return f"{name}-{quantize}" if quantize else name
