"""The watchdog's thread, with what it does to the program noted instead."""

import sys
import threading

import pytest

from medplib_jax.parallel import processes
from medplib_jax.parallel.processes import RESTART, Watchdog


@pytest.fixture
def ended(monkeypatch):
    """What the watchdogs ended the program with."""
    codes = []
    monkeypatch.setattr(processes, "abort", lambda reason, code: codes.append(code))
    monkeypatch.setattr(processes.faulthandler, "dump_traceback", lambda **_: None)
    yield codes
    wait_for_watchdogs()


def wait_for_watchdogs() -> None:
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join()


def test_a_program_without_beats_is_ended(ended):
    with Watchdog(0.05):
        wait_for_watchdogs()
    assert ended == [RESTART]


def test_a_program_that_is_over_is_left_alone(ended):
    """The end comes while the watchdog is busy with beats, which once made it miss the end."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            with Watchdog(60) as watchdog:
                for _ in range(200):
                    watchdog.beat()
    finally:
        sys.setswitchinterval(interval)
    wait_for_watchdogs()
    assert ended == []
