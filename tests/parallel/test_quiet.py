"""The terminal shows what a user can act on, and a command loads what it needs."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest

from medplib_jax.parallel import compilation
from tests.evaluate.evaluators import tiny
from tests.paths import ROOT

HEAVY = ("matplotlib", "tensorflow_datasets", "pandas", "medplib_jax.evaluate", "medplib_jax.datasets")


def run(program: str, **variables: str) -> subprocess.CompletedProcess:
    """Python without a choice of JAX's platforms, as a user has it."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | variables
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_reading_a_checkpoint_says_nothing(tmp_path):
    tiny.write_checkpoint(tmp_path)
    done = run(f"from medplib_jax.checkpoint import load_params; load_params({str(tmp_path)!r})", JAX_PLATFORMS="cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the extra tpu) is not installed")
def test_a_machine_without_a_tpu_does_not_load_its_library():
    program = (
        "import jax; from medplib_jax.parallel.compilation import use_cache; use_cache(); print(jax.default_backend())"
    )
    done = run(program)
    assert done.stdout.strip() in ("gpu", "tpu") or (done.stdout, done.stderr) == ("cpu\n", "")


@pytest.mark.parametrize("name", ["convert.check", "convert.from_torch", "convert.quantize", "convert.to_torch"])
def test_nor_does_a_command_that_keeps_no_programs(name, monkeypatch):
    module, asked = importlib.import_module(name), []
    monkeypatch.setattr(module, "ignore_missing_tpu", lambda: asked.append(name))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    assert asked == [name]


@pytest.mark.parametrize(
    ("name", "flags"), [("index", ["--images", "lost"]), ("retrieve", ["--records", "lost", "--index", "lost"])]
)
def test_nor_does_a_command_that_embeds_pictures(name, flags, tmp_path, monkeypatch):
    module, asked = importlib.import_module(f"medplib_jax.datasets.{name}"), []
    monkeypatch.setattr(compilation, "use_cache", lambda: asked.append(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *flags, "--checkpoint", "lost", "--out", "out"])
    assert module.main() == 1 and asked == [name]


def test_asking_loads_no_report_and_no_builders():
    done = run(f"import sys, medplib_jax.predict; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr
