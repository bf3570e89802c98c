"""Programs are counted, and found again on disk."""

import gc
import io
import re
import threading

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from medplib_jax.parallel.compilation import COMPILED, LOWERED, Compilations, compiling_shown, use_cache


def test_a_second_compilation_comes_from_the_cache(tmp_path):
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        use_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path), "a folder that was chosen before stays"
        assert gc.get_freeze_count() > 0, "tracing would look through what was imported for garbage"
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        counts = []
        for _ in range(2):
            count = Compilations()
            jax.jit(lambda x: jnp.sin(x) + 3.25).lower(jax.ShapeDtypeStruct((7,), jnp.float32)).compile()
            counts.append((count.requested, count.cached))
        assert counts == [(1, 0), (1, 1)]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        gc.unfreeze()


def test_jax_tells_when_compiling_begins_and_ends():
    """Lowering ends where compiling begins; the names of these events are JAX's."""
    heard = []

    def listen(event, *_, **__):
        heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: jnp.cos(x) * 2.75).lower(jax.ShapeDtypeStruct((5,), jnp.float32)).compile()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [event for event in heard if event in (LOWERED, COMPILED)] == [LOWERED, COMPILED]


def test_the_bar_says_that_something_is_compiled_and_for_how_long():
    said, shown = [], threading.Event()

    class Bar(tqdm):
        def set_description(self, desc=None, refresh=True):
            said.append(desc)
            if "compiling" in desc:
                shown.set()

    with Bar(desc="train", file=io.StringIO()) as bar, compiling_shown(bar, every=0.01):
        jax.monitoring.record_event_duration_secs(LOWERED, 0.0)
        assert shown.wait(60)
        jax.monitoring.record_event_duration_secs(COMPILED, 0.0)
    assert re.fullmatch(r"train, compiling, \d+ s", said[0]) and said[-1] == "train"
