"""Every test runs on a CPU with 8 virtual devices. Programs are compiled in little time, not to be fast, and kept for
all processes of this session: many tests need the same.
"""

import importlib.metadata
import os
import shutil
import tempfile

import hypothesis
import pytest

hypothesis.settings.load_profile("ci")  # no deadlines, and the same examples each time
flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jax").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")  # XLA refuses to start on a flag that it no longer has
os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's threads. With too few (8 are), kernels that are interpreted on several devices wait for each other for ever.
os.environ.setdefault("NPROC", str(max(32, os.cpu_count() or 1)))
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:  # workers and commands that tests start inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="medplib_jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


def pytest_unconfigure():
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A tiny checkpoint of random weights, to be read only."""
    from tests.evaluate.evaluators import tiny  # after JAX's flags

    path = tmp_path_factory.mktemp("run")
    tiny.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def browser():
    """A browser for pages; what needs it is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
