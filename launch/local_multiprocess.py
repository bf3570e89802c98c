"""Several processes of one run on this machine: a pod in small, for tests, debugging and hosts with a few devices.

COMMAND
    python -m launch.local_multiprocess --processes 2 --devices 4 -- \
        python -m medplib_jax.train --config=configs/stage1_align.py:tiny --workdir=runs/two --config.mesh.fsdp=2

Every process gets JAX's coordinator variables and, with --devices, that many virtual CPU devices. Its output is
prefixed with its number. When one exits with 75 (saved, hung, lost another one) or is killed, all are started again, at
most --max-restarts times; any other failure ends all. SIGTERM, SIGUSR1 and SIGINT are passed on, and then nothing is
started again.

EXIT CODES
    0    every process finished
    75   stopped by a signal after saving, or no restart was left: start it again
    130  Ctrl-C
    else that of the process that failed for good
"""

import argparse
import contextlib
import ctypes
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

RESTART = 75  # medplib_jax.parallel.processes.RESTART, without waiting for jax to be imported
GRACE_SECONDS = 30  # for the others to end by themselves after one has ended; longer than their last words take
LAST_LINES_SECONDS = (
    5  # for what a process has printed to come out; longer only when something that it started holds its output open
)
POLL_SECONDS = 0.05
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PR_SET_PDEATHSIG = 1


def environment(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What process `process` gets beside this process's environment."""
    added = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }
    if devices:
        others = [
            flag
            for flag in os.environ.get("XLA_FLAGS", "").split()
            if "xla_force_host_platform_device_count" not in flag
        ]
        added |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([f"--xla_force_host_platform_device_count={devices}", *others]),
        }
    return added


class Group:
    """The processes of one attempt."""

    def __init__(self, command: Sequence[str], processes: int, devices: int):
        port = free_port()
        self.processes, self._printers = [], []
        for process in range(processes):
            # their own session: Ctrl-C in the terminal reaches them once, through this process
            started = subprocess.Popen(
                command,
                env=os.environ | environment(process, processes, devices, port),
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                preexec_fn=die_with_parent,
            )
            printer = threading.Thread(target=prefix_lines, args=(started.stdout, process), daemon=True)
            printer.start()
            self.processes.append(started)
            self._printers.append(printer)

    def send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)  # does nothing to one that has ended

    def wait(self) -> int:
        """Waits for all of them; one exit code for the group: 0, RESTART or that of a process that failed for good."""
        codes = self._first_failures()
        deadline = time.monotonic() + GRACE_SECONDS
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        for printer in self._printers:
            printer.join(LAST_LINES_SECONDS)
        return next((code for code in codes if not asks_for_restart(code)), RESTART if codes else 0)

    def _first_failures(self) -> list[int]:
        """The exit codes of those that failed first; none when all have finished.

        Codes that come later are only a consequence.
        """
        while True:
            codes = [process.poll() for process in self.processes]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                for process, code in enumerate(codes):
                    if code:
                        print(f"process {process} {describe(code)}", file=sys.stderr, flush=True)
                return failed
            time.sleep(POLL_SECONDS)


def die_with_parent() -> None:
    """In the new process: an orphan would go on writing into a workdir that the next start uses, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def asks_for_restart(code: int) -> bool:
    """`code` as subprocess has it: minus the signal that killed the process."""
    return code == RESTART or code < 0


def describe(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


def free_port() -> int:
    """A port that stays free until it is listened on: clients get theirs from 32768 on."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


def prefix_lines(stream, process: int) -> None:
    for line in stream:
        print(f"[{process}] {line}", end="", flush=True)


def run(command: Sequence[str], processes: int, devices: int, max_restarts: int) -> int:
    """Runs the processes to their end, started again as often as allowed; returns the exit code."""
    group, stopped = None, []

    def pass_on(number: int, _frame) -> None:
        stopped.append(number)
        if group is not None:
            group.send(number)

    previous = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        for attempt in range(max_restarts + 1):
            group = Group(command, processes, devices)
            for number in stopped:  # came while they were being started
                group.send(number)
            code = group.wait()
            if code != RESTART or stopped:
                break
            if attempt < max_restarts:
                print(
                    f"starting all {processes} processes again ({attempt + 1} of at most {max_restarts} times)",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 130 if code and signal.SIGINT in stopped else code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument(
        "--devices", type=int, default=0, help="virtual CPU devices of each process; 0: the devices that it finds"
    )
    parser.add_argument("--max-restarts", type=int, default=10)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the processes' commands and variables, start nothing"
    )
    parser.add_argument("command", nargs="+", help="after --: the command, the same for every process")
    given = parser.parse_args()
    if given.processes < 1 or given.devices < 0 or given.max_restarts < 0:
        parser.error("--processes must be at least 1, --devices and --max-restarts not negative")
    if given.dry_run:
        port = free_port()
        for process in range(given.processes):
            variables = environment(process, given.processes, given.devices, port)
            print(*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(given.command))
        return 0
    return run(given.command, given.processes, given.devices, given.max_restarts)


if __name__ == "__main__":
    sys.exit(main())
