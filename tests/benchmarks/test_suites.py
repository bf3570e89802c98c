"""Every suite runs from the command line, in the tests' size, and writes the figures that it promises."""

import json

import pytest

from medplib_jax.benchmarks import __main__ as benchmarks


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


def test_memory_of_each_side_beside_what_is_predicted(tmp_path):
    flat = figures(tmp_path, "--suite", "cpu", "--size", "tiny", "--against", "torch", "--only", "memory")
    assert flat["memory.ours_over_torch"] == flat["memory.ours.peak_gb"] / flat["memory.torch.peak_gb"]
    assert flat["memory.measured_over_predicted"] == flat["memory.ours.measured_gb"] / flat["memory.ours.predicted_gb"]
    assert 0 < flat["memory.ours.predicted_gb"] < flat["memory.ours.peak_gb"]


def test_answers(tmp_path):
    flat = figures(
        tmp_path, "--suite", "decode", "--size", "tiny", "--against", "torch", "--batch", "2", "--new-tokens", "3"
    )
    assert flat["decode.batch_2.speedup"] > 0 and flat["first_token.batch_2.speedup"] > 0
    assert flat["decode.batch_2.ours.per_second"] == pytest.approx(3 * 2 / flat["decode.batch_2.ours.seconds"])


@pytest.mark.slow
def test_the_accelerator_suite_runs_on_a_cpu(tmp_path):
    arguments = (
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--batch",
        "1",
        "--new-tokens",
        "24",
        "--workers",
        "1",
        "--seconds",
        "2",
    )
    flat = figures(tmp_path, "--suite", "gpu", *arguments)
    assert flat["machine.matmul_flops"] > 0 and flat["decode.batch_1.bandwidth_share"] > 0
    assert flat["memory.measured_over_predicted"] > 0 and 0 <= flat["input.waiting_share"] <= 1
    assert 0 < flat["train_step.stage_III.mfu"] < 1 and 0 < flat["train_step.stage_IV.mfu"] < 1


def test_input_at_a_rate(tmp_path):
    flat = figures(tmp_path, "--suite", "data", "--rate", "32", "--workers", "1", "--seconds", "1")
    assert flat["input.rows_per_second_per_core"] > 0 and 0 <= flat["input.waiting_share"] < 1


@pytest.mark.slow
def test_the_second_start_finds_its_programs(tmp_path):
    flat = figures(tmp_path, "--suite", "cpu", "--size", "tiny", "--only", "startup")
    assert flat["startup.second.cached"] > 0 == flat["startup.first.cached"]


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["--suite", "cpu", "--only", "moe,memroy"])
    assert "memroy: --suite cpu has train_step, moe, parts, memory, startup" in capsys.readouterr().err
