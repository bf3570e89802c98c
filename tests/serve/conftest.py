"""A real server with a tiny checkpoint of random weights, in a process of its own, and a predictor of the same
checkpoint.
"""

import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from launch.local_multiprocess import free_port
from medplib_jax.decode.predictor import Predictor
from tests.paths import ROOT

MAX_NEW_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Server:
    """Where a server listens, and its process."""

    url: str
    process: subprocess.Popen
    log: Path


@contextlib.contextmanager
def running(workdir: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """A server that answers, until the context ends."""
    port = free_port()
    command = [sys.executable, "-m", "medplib_jax.serve", "--checkpoint", str(workdir), "--port", str(port)]
    command += ["--store", str(log.with_suffix("")), *arguments]
    with log.open("w") as file, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file) as process:
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            wait_until_healthy(server)
            yield server
        finally:
            process.kill()


def wait_until_healthy(server: Server, seconds: float = 300) -> None:
    """Returns when the server answers. AssertionError with its log when it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/healthz", timeout=5).status_code == 200:
                return
    raise AssertionError(server.log.read_text())


@pytest.fixture(scope="session")
def server(workdir, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with running(workdir, log, "--max-new-tokens", str(MAX_NEW_TOKENS), "--structures", "lung; heart") as server:
        yield server


@pytest.fixture(scope="session")
def predictor(workdir) -> Predictor:
    return Predictor(workdir, max_new_tokens=MAX_NEW_TOKENS)
