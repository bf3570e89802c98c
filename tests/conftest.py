"""Every test runs on a CPU with 8 virtual devices. Programs are compiled in little time, not to be fast."""

import importlib.metadata
import os

flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jax").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")  # XLA refuses to start on a flag that it no longer has
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
