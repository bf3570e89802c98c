"""Programs are counted, and found again on disk."""

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from medplib_jax.parallel.compilation import Compilations, use_cache


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
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        counts = []
        for _ in range(2):
            count = Compilations()
            jax.jit(lambda x: jnp.sin(x) + 3.25).lower(jax.ShapeDtypeStruct((7,), jnp.float32)).compile()
            counts.append((count.requested, count.cached))
            jax.clear_caches()
        assert counts == [(1, 0), (1, 1)]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
