"""What libraries would print although no user can act on it."""

import contextlib
import importlib.util
from collections.abc import Iterator

import absl.logging
import jax


def ignore_missing_tpu() -> None:
    """Keeps JAX from loading libtpu where there is no TPU: it prints errors about hosts that were not to be found.

    libtpu is installed on such machines to compile for TPUs. A choice of platforms that was made (JAX_PLATFORMS) stays.
    """
    from jax._src import hardware_utils  # the number of chips has no public name

    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    has_gpu_plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if not chips and not has_gpu_plugin and not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")


@contextlib.contextmanager
def without_orbax_remarks() -> Iterator[None]:
    """No warnings of Orbax, such as that a folder which is only to be read is read-only."""
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(before)
