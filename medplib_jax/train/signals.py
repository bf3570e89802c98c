"""How a run is told to stop: signals of this process, and what all processes agreed on."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Within the context, the first SIGTERM, SIGUSR1 (batch systems send it) or SIGINT is only noted in `signal`; a second one acts as usual.

    Several processes stop on what they `agreed` on, so that all stop at the same step whichever of them got the signal.
    """

    def __init__(self):
        self.signal: int | None = None
        self.agreed: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
            }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(
                number, signal.SIG_DFL if handler is None else handler
            )  # None: jax's own, which Python cannot put back

    def _note(self, number: int, _frame) -> None:
        self.signal = number
        self.__exit__()

    def requested(self, call: int) -> bool:
        """Whether to stop now; `call` counts the calls. Also True at the step that JAX's preemption service set for all processes."""
        if jax.process_count() == 1:
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(call):
            self.agreed = signal.SIGTERM
        return self.agreed is not None

    def reason(self) -> int | None:
        """The signal that ended the run."""
        return self.signal if jax.process_count() == 1 else self.agreed
