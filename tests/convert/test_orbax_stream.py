import functools
import threading
import weakref

import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert import orbax_stream
from medplib_jax.parallel import ahead

SLAB, COUNT = 1 << 12, 24  # bytes, slabs


@pytest.mark.parametrize(("making", "writing"), [(3, 2), (0, 0)])
def test_slabs_that_are_made_and_not_yet_written_stay_below_the_limits(tmp_path, monkeypatch, making, writing):
    monkeypatch.setattr(ahead, "MAX_BYTES", making * SLAB)
    monkeypatch.setattr(orbax_stream, "MAX_PENDING_BYTES", writing * SLAB)
    lock, arrays, peak = threading.Lock(), [], [0]

    def make(number):
        slab = np.full(SLAB // 4, number, np.int32)
        with lock:
            arrays.append(weakref.ref(slab))
            peak[0] = max(peak[0], sum(array() is not None for array in arrays))
        return slab

    slabs = [((number,), functools.partial(make, number)) for number in range(COUNT)]
    streamed = orbax_stream.Streamed((COUNT, SLAB // 4), np.dtype(np.int32), (1, SLAB // 4), slabs)
    with ocp.Checkpointer(orbax_stream.handler()) as checkpointer:
        checkpointer.save(tmp_path / "saved", args=ocp.args.PyTreeSave({"array": streamed}))
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "saved")["array"]
    np.testing.assert_array_equal(restored, np.repeat(np.arange(COUNT)[:, None], SLAB // 4, axis=1))
    assert peak[0] <= max(1, making + writing)
