"""How a run is told to stop: signals of this process, and what all processes agreed on."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Within the context, the first SIGTERM, SIGUSR1 (batch systems send it) or SIGINT is only noted in `signal`.

    A second one acts as usual. Several processes stop on what they agreed on (`hear`), so that all stop at the same
    step whichever of them got the signal.
    """

    def __init__(self):
        self.signal: int | None = None
        self._agreed: int | None = None
        self._calls = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
            }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            # None: jax's own handler, which Python cannot put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _frame) -> None:
        self.signal = number
        self.__exit__()

    def hear(self, number: int) -> None:
        """Notes the signal that some process reported with a step's metrics, the same in all processes; 0 for none."""
        self._agreed = self._agreed or number or None

    def requested(self) -> bool:
        """Whether to stop before the next step; asked once per step by every process.

        True also at the step that JAX's preemption service set for all processes.
        """
        if jax.process_count() == 1:
            return self.signal is not None
        self._calls += 1
        if multihost_utils.reached_preemption_sync_point(self._calls):
            self.hear(signal.SIGTERM)
        return self._agreed is not None

    @property
    def reason(self) -> int | None:
        """The signal that ended the run."""
        return self.signal if jax.process_count() == 1 else self._agreed
