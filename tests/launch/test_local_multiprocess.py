"""The launcher with commands that need no jax; what it does for a training run is tested in
tests/parallel/test_processes.py."""

import os
import shlex
import signal
import subprocess
import sys

import psutil
import pytest

from launch import local_multiprocess
from medplib_jax.parallel import processes as multihost
from tests.paths import ROOT

COUNT = (
    "import os, pathlib, signal, sys; me = os.environ['JAX_PROCESS_ID'];"
    " n = len(list(pathlib.Path('{}').glob(me + '.*'))); pathlib.Path('{}', f'{{me}}.{{n}}').touch(); "
)


@pytest.fixture
def starts(tmp_path):
    """start(body, processes, max_restarts) -> exit code; in `body`, `me` is the process and `n` how often it was
    started before."""

    def start(body: str, processes: int = 2, max_restarts: int = 3) -> int:
        code = COUNT.format(tmp_path, tmp_path) + body
        return local_multiprocess.run([sys.executable, "-S", "-c", code], processes, 0, max_restarts)

    start.count = lambda: {process: len(list(tmp_path.glob(f"{process}.*"))) for process in (0, 1)}
    return start


def test_every_process_gets_its_variables_and_a_prefix(starts, capfd):
    assert starts("print('I am', me, 'of', os.environ['JAX_NUM_PROCESSES'])") == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] I am 0 of 2", "[1] I am 1 of 2"]


def test_all_start_again_when_one_asks_for_it_or_is_killed(starts, capfd):
    assert (
        starts("n == 0 and me == '1' and sys.exit(75); n == 1 and me == '0' and os.kill(os.getpid(), signal.SIGKILL)")
        == 0
    )
    assert starts.count() == {0: 3, 1: 3}
    assert "process 0 was killed by SIGKILL" in capfd.readouterr().err


def test_restarts_have_a_limit(starts):
    assert starts("sys.exit(75)", max_restarts=2) == 75
    assert starts.count() == {0: 3, 1: 3}


def test_one_that_fails_for_good_ends_all(starts, monkeypatch):
    monkeypatch.setattr(local_multiprocess, "GRACE_SECONDS", 0)
    assert starts("me == '1' and sys.exit(3); signal.pause()") == 3
    assert starts.count()[1] == 1


def launcher(*command: str) -> subprocess.Popen:
    arguments = [
        sys.executable,
        "-m",
        "launch.local_multiprocess",
        "--processes",
        "2",
        "--",
        sys.executable,
        "-S",
        "-c",
        *command,
    ]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signals_are_passed_on_and_nothing_starts_again(number, expected):
    body = f"import signal, sys; signal.signal({int(number)}, lambda *_: sys.exit(75));"
    body += " print('ready', flush=True); signal.pause()"
    process = launcher(body)
    assert {process.stdout.readline(), process.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
    process.send_signal(number)
    assert process.wait(60) == expected and process.stdout.read() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parent")
def test_no_process_outlives_the_launcher():
    process = launcher("import os, signal; print(os.getpid(), flush=True); signal.pause()")
    children = [psutil.Process(int(process.stdout.readline().split()[1])) for _ in range(2)]
    process.kill()
    assert psutil.wait_procs(children, timeout=60)[1] == []


def test_dry_run_prints_what_each_process_would_get():
    arguments = [
        "--processes",
        "2",
        "--devices",
        "4",
        "--dry-run",
        "--",
        "python",
        "-m",
        "medplib_jax.train",
        "--workdir=a b",
    ]
    printed = subprocess.run(
        [sys.executable, "-m", "launch.local_multiprocess", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_cpu_x=1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for number, line in enumerate(printed):
        words = shlex.split(line)
        variables = dict(word.split("=", 1) for word in words[:5])
        assert words[5:] == ["python", "-m", "medplib_jax.train", "--workdir=a b"]
        assert (
            variables["JAX_PROCESS_ID"] == str(number)
            and variables["JAX_NUM_PROCESSES"] == "2"
            and variables["JAX_PLATFORMS"] == "cpu"
        )
        assert variables["XLA_FLAGS"] == "--xla_force_host_platform_device_count=4 --xla_cpu_x=1"
        assert variables["JAX_COORDINATOR_ADDRESS"].startswith("localhost:")
    assert len(printed) == 2


def test_the_exit_code_that_asks_for_a_restart_is_the_programs():
    assert local_multiprocess.RESTART == multihost.RESTART
