"""Several real processes on this machine:

They agree, end together, stop and resume together, and train as one process would.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import jax
import psutil
import pytest

from medplib_jax.config.experiment import EvalConfig, MeshConfig
from medplib_jax.data.pipeline import make_loader
from medplib_jax.evaluate.in_training import HeldOutFigures
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.processes import RESTART, initialize_distributed
from medplib_jax.train import loop as train_module
from medplib_jax.train.metrics_log import read_metrics
from tests import tiny_bird_run, tiny_run
from tests.paths import ROOT

TOGETHER = """
import os, sys, time
import jax, numpy as np
from medplib_jax.parallel import processes as multihost
from medplib_jax.config.experiment import EvalConfig, MeshConfig
from medplib_jax.evaluate.in_training import HeldOutFigures
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.processes import initialize_distributed

initialize_distributed()
me = jax.process_index()
agree = multihost.Agreement(make_mesh(MeshConfig(fsdp=2, data=2)))
found = jax.device_get(agree(stop=15 * me, skipped=3 + me))
first, every = multihost.of_process_0("a", f"from {me}"), multihost.of_every_process("b", f"of {me}")
print(first, every, found["stop"], found["skipped"], flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset with its tokenizer, and the compilation cache of all processes."""
    folder = tmp_path_factory.mktemp("multihost")
    tiny_run.prepare(str(folder))
    return folder


def start(
    command: list[str], folder: Path, processes: int, devices: int = 1, restarts: int = 0, **variables: str
) -> subprocess.Popen:
    """The launcher, with one pipe for what all processes say."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    launcher = [
        sys.executable,
        "-m",
        "launch.local_multiprocess",
        "--processes",
        str(processes),
        "--devices",
        str(devices),
    ]
    return subprocess.Popen(
        [*launcher, "--max-restarts", str(restarts), "--", sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **cache, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def training(folder: Path, workdir: Path, run: ModuleType = tiny_run, **flags) -> list[str]:
    """The command of a run in which every process has one row of `fsdp`; `flags` are fields, with __ for the dots."""
    fields = [f"--config.{name.replace('__', '.')}={value}" for name, value in flags.items()]
    return [
        "-m",
        "tests.train.noting",
        f"--config={run.__file__}:{folder}",
        f"--workdir={workdir}",
        "--config.mesh.fsdp=2",
        *fields,
    ]


def losses(workdir: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_metrics(str(workdir))}


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    while len(losses(workdir)) < step:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def one_of(process: subprocess.Popen, number: int) -> psutil.Process:
    """The launcher's child that is process `number` of the run."""
    return next(
        child for child in psutil.Process(process.pid).children() if child.environ()["JAX_PROCESS_ID"] == str(number)
    )


def train_alone(
    folder: Path, workdir: Path, monkeypatch, devices: int, run: ModuleType = tiny_run, **settings
) -> dict[int, tuple[float, float]]:
    """The losses of the same run in this process."""
    config = run.experiment(str(folder))
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=2), train=dataclasses.replace(config.train, **settings))
    monkeypatch.setattr(train_module, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:devices]))
    train_module.train(config, str(workdir))
    return losses(workdir)


def assert_close(found: dict[int, tuple[float, float]], expected: dict[int, tuple[float, float]]) -> None:
    """Equal but for the order of sums:

    Between processes they are taken in another order than between devices of one process.
    """
    print(
        "largest relative difference",
        max(abs(a / b - 1) for step in expected for a, b in zip(found[step], expected[step], strict=True)),
    )
    assert found.keys() == expected.keys()
    for step, values in found.items():
        assert values == pytest.approx(expected[step], rel=1e-5), step


@pytest.mark.parametrize(
    "variables", [{}, {"JAX_NUM_PROCESSES": "2"}, {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "one"}]
)
def test_a_coordinator_alone_is_explained(monkeypatch, variables):
    for name, value in {"JAX_COORDINATOR_ADDRESS": "host:1234", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="expected JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        initialize_distributed()


def test_processes_agree_and_an_error_in_one_ends_all(folder):
    body = (
        TOGETHER
        + "with multihost.abort_together():\n    if me == 1:\n        raise ValueError('bad record')\n"
        + "    time.sleep(3600)"
    )
    process = start(["-c", body], folder, processes=2, devices=2)
    said = process.communicate()[0]
    assert process.returncode == 1
    for number in (0, 1):
        assert f"[{number}] from 0 ['of 0', 'of 1'] 15 7\n" in said
    assert "process 1 ends the run: ValueError: bad record" in said


def test_a_hung_process_says_where_and_all_ask_for_a_restart(folder):
    body = TOGETHER + (
        "def stuck():\n    time.sleep(3600)\n"
        "with multihost.abort_together(), multihost.Watchdog(1 if me == 1 else 3600):\n    stuck()"
    )
    process = start(["-c", body], folder, processes=2, devices=2)
    said = process.communicate()[0]
    assert process.returncode == RESTART
    assert "no step was finished for 1 s; what each thread is doing" in said and "process 1 ends the run" in said
    assert '[1]   File "<string>"' in said and " in stuck\n" in said


@pytest.mark.parametrize("checkpoint_every", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_and_a_signal_to_one_stops_and_restarts_both(
    folder, tmp_path, monkeypatch, checkpoint_every
):
    """Metrics are read, and so signals heard, in two places: before a checkpoint and after a step without one."""
    process = start(
        training(folder, tmp_path / "two", train__steps=6, train__checkpoint_every=checkpoint_every),
        folder,
        processes=2,
        restarts=1,
    )
    wait_for_step(tmp_path / "two", 2, process)
    one_of(process, 1).send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "exited with 75" in said and "starting all 2 processes again" in said and "resuming" in said
    assert len(list(tmp_path.glob("two/metrics.jsonl"))) == 1  # one writer
    assert_close(losses(tmp_path / "two"), train_alone(folder, tmp_path / "one", monkeypatch, devices=2, steps=6))


@pytest.mark.slow
def test_two_processes_answer_held_out_records_as_one(folder, tmp_path, monkeypatch):
    source, settings = f"{folder}/phantom/train/align.json", {"steps": 4, "eval_every": 2, "eval_records": 5}
    asked = {f"train__{name}": value for name, value in settings.items()}
    command = training(
        folder, tmp_path / "two", **asked, train__eval_tasks="('align',)", eval__sources=f"('{source}',)"
    )
    process = start([*command, "--config.eval.max_new_tokens=4"], folder, processes=2)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    config = tiny_run.experiment(str(folder))
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(fsdp=2),
        train=dataclasses.replace(config.train, **settings, eval_tasks=("align",)),
        eval=EvalConfig(sources=(source,), max_new_tokens=4),
    )
    monkeypatch.setattr(train_module, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:2]))
    train_module.train(config, str(tmp_path / "one"), HeldOutFigures)
    two, one = (
        {(row["step"], name): row[name] for row in read_metrics(str(tmp_path / run)) for name in row if "eval/" in name}
        for run in ("two", "one")
    )
    assert {step for step, _ in one} == {2, 4} and any(name.startswith("eval/align/") for _, name in one)
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 2), (4, 1)])
def test_any_number_of_processes_gives_the_same_losses(folder, tmp_path, monkeypatch, processes, devices):
    process = start(training(folder, tmp_path / "run"), folder, processes, devices)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert_close(losses(tmp_path / "run"), train_alone(folder, tmp_path / "one", monkeypatch, devices=4))


@pytest.mark.slow
def test_two_processes_train_bird_as_one(tmp_path, monkeypatch):
    data = tmp_path / "data"
    tiny_bird_run.prepare(data)
    process = start(training(data, tmp_path / "two", tiny_bird_run, train__steps=6), data, processes=2)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    expected = train_alone(data, tmp_path / "one", monkeypatch, devices=2, run=tiny_bird_run, steps=6)
    assert_close(losses(tmp_path / "two"), expected)


@pytest.mark.slow
def test_half_and_double_the_processes_go_on_with_the_same_examples(folder, tmp_path, monkeypatch):
    """2 processes, stopped; 1 goes on, stopped; 4 finish: every row of every step is read once, by one process."""
    steps = 30
    for number, (processes, until) in enumerate([(2, 5), (1, 12), (4, None)]):
        (tmp_path / f"notes{number}").mkdir()
        command = training(
            folder, tmp_path / "run", train__steps=steps, mesh__fsdp=2 if processes < 4 else 4, mesh__data=-1
        )
        process = start(command, folder, processes, 4 // processes, NOTES=str(tmp_path / f"notes{number}"))
        if until is not None:
            wait_for_step(tmp_path / "run", until, process)
            process.send_signal(signal.SIGTERM)
        said = process.communicate()[0]
        assert process.returncode == (0 if until is None else RESTART), said
    config = tiny_run.experiment(str(folder))
    plan, _ = make_loader(config.data, config.model, config.data.root).plan(config.train.seed)
    read = {}
    for notes in tmp_path.glob("notes*/*.jsonl"):
        for line in map(json.loads, notes.read_text().splitlines()):
            for row, record in zip(line["rows"], line["records"], strict=True):
                assert read.setdefault((line["step"], row), record) is record  # nobody else has read it
    wanted = {(step, row): record for step in range(steps) for row, record in enumerate(plan.batch(step)[1].tolist())}
    assert read == wanted
    assert_close(losses(tmp_path / "run"), train_alone(folder, tmp_path / "one", monkeypatch, devices=4, steps=steps))


@pytest.mark.slow
def test_a_record_that_one_process_cannot_read_ends_all_and_is_named(folder, tmp_path):
    records = json.loads((folder / "phantom/train/align.json").read_text())
    records[3]["image"] = "images/missing.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    process = start(
        training(folder, tmp_path / "run", data__sources=f"('{tmp_path}/bad.json',)"), folder, processes=2, restarts=3
    )
    said = process.communicate()[0]
    assert process.returncode == 1 and "ends the run" in said and "bad.json, record 3" in said and "again" not in said


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all(folder, tmp_path):
    process = start(training(folder, tmp_path / "run", optim__lr=1e30), folder, processes=2, restarts=3)
    said = process.communicate()[0]
    assert process.returncode == 1 and "not finite" in said and "align.json[" in said and "starting all" not in said


@pytest.mark.slow
def test_a_notice_that_comes_to_jax_before_training_begins_is_heard(folder, tmp_path):
    """Up to then the signal is the business of JAX's preemption service, which tells all processes at which step to
    stop.
    """
    process = start(
        training(folder, tmp_path / "run", train__steps=2000),
        folder,
        processes=2,
        EARLY_SIGNAL=str(int(signal.SIGTERM)),
    )
    said = process.communicate()[0]
    assert process.returncode == RESTART, said
    assert "SIGTERM: step 0 of 2000 is saved; run the same command to resume" in said
