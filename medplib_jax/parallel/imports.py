"""How a command imports what it needs. Nothing is imported here itself but the standard library."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """For imports. What they make is no garbage, yet to look for some takes a third of the time that JAX, Flax and
    Orbax need.

    Garbage collection never looks at it afterwards, either: tracing a program would make it do so again and again.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
