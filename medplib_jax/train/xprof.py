"""A trace of some training steps, for xprof or TensorBoard's profile page."""

import contextlib
from collections.abc import Iterator

import jax


class StepTrace:
    """Traces the steps of the range [first, last), each under its number, into a folder; None traces nothing."""

    def __init__(self, steps: tuple[int, int] | None, folder: str):
        self._first, self._last = steps or (-1, -1)
        self._folder, self._running = folder, False

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """One step, counted from 0; the trace stops at the first step after the range, when its last one is done."""
        if self._running and number >= self._last:
            self._stop()
        if not self._running and self._first <= number < self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def _stop(self) -> None:
        if self._running:
            jax.effects_barrier()
            jax.profiler.stop_trace()
            self._running = False
