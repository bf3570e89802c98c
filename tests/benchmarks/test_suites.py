"""Every suite runs from the command line, in the tests' size, and writes the figures that it promises."""

import importlib.util
import json
import pickle
import re
import runpy
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from medplib_jax.benchmarks import __main__ as benchmarks
from medplib_jax.benchmarks import grouped, kernels, roofline
from medplib_jax.models.kernels import grouped_matmul_blocks
from tests.helpers import tiny_experiment
from tests.paths import ROOT

KERNELS = {f"kernels.{name.replace(' ', '_')}.error" for name in kernels.programs()}


def figures(tmp_path, *arguments: str) -> dict[str, float]:
    file = tmp_path / "figures.json"
    benchmarks.main([*arguments, "--rounds", "2", "--json", str(file)])
    return json.loads(file.read_text())


def test_training_step_and_its_parts(tmp_path, capsys):
    arguments = ("--size", "tiny", "--against", "torch", "--no-compile", "--only", "train_step,moe,parts")
    flat = figures(tmp_path, "--suite", "cpu", *arguments)
    assert flat["train_step.speedup"] == flat["train_step.torch_eager.seconds"] / flat["train_step.ours.seconds"]
    assert flat["moe.over_dense"] == flat["moe.mixture.seconds"] / flat["moe.dense.seconds"]
    assert sum(name.startswith("parts.") for name in flat) == 6
    assert "| torch eager |" in capsys.readouterr().out


def test_memory_beside_what_is_predicted(tmp_path):
    flat = figures(tmp_path, "--suite", "cpu", "--size", "tiny", "--only", "memory")
    assert flat["memory.measured_over_predicted"] == flat["memory.ours.measured_gb"] / flat["memory.ours.predicted_gb"]
    assert 0 < flat["memory.ours.predicted_gb"] < flat["memory.ours.peak_gb"]


def test_answers(tmp_path):
    sizes = ("--size", "tiny", "--batch", "2", "--new-tokens", "3", "--only", "batch_2")
    flat = figures(tmp_path, "--suite", "decode", "--against", "torch", *sizes)
    assert flat["decode.batch_2.speedup"] > 0 and flat["first_token.batch_2.speedup"] > 0
    assert flat["decode.batch_2.ours.per_second"] == pytest.approx(3 * 2 / flat["decode.batch_2.ours.seconds"])


def test_bird_beside_pytorch(tmp_path):
    arguments = ("--size", "tiny", "--against", "torch", "--no-compile", "--new-tokens", "3")
    flat = figures(tmp_path, "--suite", "bird", *arguments)
    assert flat["bird_step.speedup"] > 0 and flat["decode.batch_1.speedup"] > 0


SMALL = ("--device", "cpu", "--size", "tiny", "--batch", "1", "--new-tokens", "24", "--workers", "1", "--seconds", "2")


def test_grouped_products_in_every_way():
    table = grouped.measure(tiny_experiment().model.llm, rows=96)
    assert [way for way, *_ in table.rows] == ["blocks", "xla"] and "default: blocks" in table.title
    assert table.flat["grouped.blocks.flops"] > 0 < table.flat["grouped.blocks.gradient_flops"]
    assert 0 <= table.flat["grouped.blocks.error"] < kernels.TOLERANCE


def test_a_way_that_is_wrong_fails_its_part(monkeypatch):
    monkeypatch.setattr(grouped_matmul_blocks, "weight_gradient", lambda x, dy, sizes, **_: jnp.zeros((2, 16, 32)))
    with pytest.raises(RuntimeError, match="differ from XLA's: blocks"):
        grouped.measure(tiny_experiment().model.llm, rows=96)


@pytest.mark.slow
def test_the_accelerator_suite_runs_on_a_cpu(tmp_path):
    flat = figures(tmp_path, "--suite", "gpu", "--against", "torch", "--no-compile", *SMALL)
    assert flat["machine.matmul_flops"] > 0 and flat["decode.batch_1.bandwidth_share"] > 0
    assert flat["memory.measured_over_predicted"] > 0 and 0 <= flat["input.waiting_share"] <= 1
    assert 0 < flat["train_step.stage_III.mfu"] < 1 and 0 < flat["train_step.stage_IV.mfu"] < 1
    assert flat["memory.ours_over_torch"] == flat["memory.ours.peak_gb"] / flat["memory.torch.peak_gb"]
    assert flat["train_step.stage_IV.speedup"] > 0 and flat["decode.batch_1.speedup"] > 0


def test_without_an_accelerator_its_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["--suite", "gpu"])
    assert "--suite gpu needs an accelerator" in capsys.readouterr().err


def test_without_pytorch_there_is_nothing_to_measure_against(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        benchmarks.main(["--suite", "cpu", "--against", "torch"])
    assert "need PyTorch: pip install -e '.[torch]'" in capsys.readouterr().err


def test_the_rival_travels_to_processes_that_do_not_run_the_command():
    """What a command's own module defines cannot: memory is measured in a process of each side."""
    command = runpy.run_module("medplib_jax.benchmarks.__main__", run_name="as a command")
    options = command["parse"](["--suite", "cpu", "--against", "torch"])
    assert pickle.loads(pickle.dumps(command["rival"](options))) == command["rival"](options)


def test_kernels_beside_the_cpu(tmp_path):
    flat = figures(tmp_path, "--suite", "gpu", *SMALL, "--only", "kernels")
    assert set(flat) == KERNELS and all(0 <= error < kernels.TOLERANCE for error in flat.values())


def test_a_kernel_that_is_wrong_fails_the_suite_that_goes_on(tmp_path, monkeypatch, capsys):
    nothing = {"product": (lambda x: (x / 0 * 0,), (np.ones(3, np.float32),))}
    monkeypatch.setattr(kernels, "programs", lambda: nothing)
    with pytest.raises(SystemExit, match="differ from the CPU's: product"):
        figures(tmp_path, "--suite", "gpu", *SMALL, "--only", "kernels,rates")
    assert "bfloat16 product" in capsys.readouterr().out


def test_the_budget_ends_a_suite_in_time(tmp_path):
    """Also while a part is measured: here the input, watched for an hour."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "medplib_jax.benchmarks", "--suite", "gpu", *SMALL, "--json", str(file)]
    command += ["--only", "kernels,input,moe", "--seconds", "3600", "--budget", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    (missing,) = re.findall(r"12 s are over; not measured: (.*)", done.stderr)
    assert done.returncode == 0 and missing.endswith("input, moe")
    if "kernels" not in missing:  # a busy machine may not come so far
        assert set(json.loads(file.read_text())) == KERNELS


def test_input_at_a_rate(tmp_path):
    flat = figures(tmp_path, "--suite", "data", "--rate", "4", "--workers", "1", "--seconds", "1")
    assert flat["input.rows_per_second_per_core"] > 0 and 0 <= flat["input.waiting_share"] < 1


@pytest.mark.slow
def test_the_second_start_finds_its_programs(tmp_path):
    flat = figures(tmp_path, "--suite", "cpu", "--size", "tiny", "--only", "startup")
    assert flat["startup.second.cached"] > 0 == flat["startup.first.cached"]


def test_an_unknown_part_is_named():
    with pytest.raises(SystemExit, match="memroy: --suite cpu has train_step, moe, parts, memory, startup"):
        benchmarks.main(["--suite", "cpu", "--only", "moe,memroy"])


def test_bounds_on_tpus_without_their_compiler_say_so(monkeypatch):
    """What the process that compiles says comes through."""
    monkeypatch.setattr(roofline, "examine", _without_libtpu)
    with pytest.raises(SystemExit, match="roofline: compiling for a TPU needs libtpu"):
        benchmarks.main(["--suite", "tpu"])


def _without_libtpu(request):
    raise ModuleNotFoundError("compiling for a TPU needs libtpu")


@pytest.mark.slow
def test_slots_are_refilled(tmp_path):
    flat = figures(tmp_path, "--suite", "decode", "--only", "slots")
    assert flat["mixed.refilled_over_static"] > 0 and flat["long.slots_over_one"] > 0
