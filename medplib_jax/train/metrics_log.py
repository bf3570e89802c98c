"""What a run leaves to read: metrics.jsonl, TensorBoard events, and how well it used the machine."""

import json
import time

import jax
from etils import epath


class MetricWriter:
    """Appends {"step": ..., **metrics} lines to metrics.jsonl and the same scalars to TensorBoard. Silent on all but process 0.

    On resume, lines of steps after `start_step` (written after the last checkpoint, or half-written) are removed.
    """

    def __init__(self, workdir: str, start_step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # slow to import, and only process 0 needs it

        self.path = epath.Path(workdir) / "metrics.jsonl"
        kept = [json.dumps(row) for row in read_metrics(workdir) if row["step"] <= start_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))
        self._board = SummaryWriter(str(epath.Path(workdir) / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if not self._active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._active:
            self._board.close()


def read_metrics(workdir: str) -> list[dict[str, float]]:
    """The rows of metrics.jsonl in order; a half-written last line is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


class Clock:
    """Seconds per step, and goodput: the share of the run's wall time that was not start-up, restoring or compiling."""

    def __init__(self):
        self._begin = self._last = time.perf_counter()
        self._lost = 0.0

    def begin_training(self) -> None:
        """All time up to now was start-up."""
        self._last = time.perf_counter()
        self._lost = self._last - self._begin

    def lose(self, seconds: float) -> None:
        """Leaves these seconds (of compiling) out of the step's time and out of the goodput."""
        self._lost += seconds
        self._last += seconds

    def seconds_per_step(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed

    def goodput(self) -> float:
        return 1.0 - self._lost / (time.perf_counter() - self._begin)
