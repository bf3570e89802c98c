"""Sweeps by real processes: however many share the work, and however often they are killed, the files are the same
bytes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from launch import local_multiprocess
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.evaluate.own import load_metrics
from medplib_jax.evaluate.rescore import rescore
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.evaluate.tasks import folder_tasks
from tests.evaluate.evaluators import tiny
from tests.paths import ROOT

SETTINGS = {"select": "grounding", "shard": 2, "slots": 2, "refill": 1}
KILLS = 20
MINE = """
from medplib_jax.evaluate.own import metric


@metric("mean number of letters", unit="letters")
def letters(answer, truth, meta):
    return len(answer.text)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny.write_data(tmp_path_factory.mktemp("data") / "root")
    records = json.loads((folder / "test" / "grounding.json").read_text())
    (folder / "test" / "grounding.json").write_text(
        json.dumps(records + records[:1])
    )  # 7 records: 4 shards, the last one half
    (folder / "mine.py").write_text(MINE)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    path.mkdir()
    tiny.write_checkpoint(path)
    return path


def command(folder, run, workdir):
    values = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    config = f"--config=configs/eval_folder.py:{folder}"
    mine = (folder if folder.is_dir() else folder.parent) / "mine.py"
    return [
        sys.executable,
        "-m",
        "medplib_jax.evaluate",
        config,
        f"--workdir={workdir}",
        f"--config.checkpoints={run}",
        f"--config.metrics={mine}",
        *values,
    ]


def files(workdir):
    """All but the reports, and when and by which command what stands in sweep.json was made."""
    found = {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in sorted(workdir.rglob("*.json*"))
        if path.name != "report.json"
    }
    return found | {"sweep.json": json.loads(found["sweep.json"]) | {"runs": []}}


@pytest.fixture(scope="module")
def alone(folder, run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    run_sweep(SweepConfig(checkpoints=str(run), tasks=folder_tasks(folder), **SETTINGS), workdir)
    rescore(workdir, load_metrics(str(folder / "mine.py")))
    return files(workdir)


@pytest.mark.parametrize(
    ("processes", "devices"),
    [
        (2, 1),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(1, 8, marks=pytest.mark.slow),
        pytest.param(2, 4, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_and_devices_writes_the_same(processes, devices, folder, run, alone, tmp_path):
    assert local_multiprocess.run(command(folder, run, tmp_path), processes, devices, 0) == 0
    assert files(tmp_path) == alone
    assert (tmp_path / "report.html").exists()


def test_a_workdir_of_each_process_is_refused(folder, run, tmp_path, capfd):
    words = " ".join(command(folder, run, f"{tmp_path}/$JAX_PROCESS_ID/sweep"))
    assert local_multiprocess.run(["bash", "-c", f"exec {words}"], 2, 1, 0) == 1
    assert f"{tmp_path}/1/sweep) does not see what process 0 writes" in capfd.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_ends_with_the_same_files(folder, run, tmp_path):
    records = json.loads((folder / "test" / "grounding.json").read_text())
    (folder / "grounding.json").write_text(json.dumps(records * 20))
    whole, killed, moments = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    subprocess.run(command(folder / "grounding.json", run, whole), check=True, cwd=ROOT)
    kills = 0
    while kills < KILLS:
        before = written(killed)
        process = subprocess.Popen(command(folder / "grounding.json", run, killed), cwd=ROOT)
        while process.poll() is None and written(killed) == before:
            time.sleep(0.005)
        time.sleep(moments.expovariate(1 / 0.05))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
        if process.returncode == 0:
            for path in list(killed.glob("predictions/*/*/*"))[::2]:  # it was too fast: some of it once more
                path.unlink()
    subprocess.run(command(folder / "grounding.json", run, killed), check=True, cwd=ROOT)
    assert files(killed) == files(whole)


def written(workdir):
    return sum(path.stat().st_size for path in workdir.glob("predictions/*/*/*"))
