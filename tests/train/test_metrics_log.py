import dataclasses
import json

import pytest

from medplib_jax.config.model import ModelConfig, MoeConfig
from medplib_jax.train.flops import mfu, step_flops
from medplib_jax.train.metrics_log import Clock, MetricWriter, read_metrics


def test_rows_after_the_resumed_step_and_half_written_ones_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo'
    )
    writer = MetricWriter(str(tmp_path), start_step=2)
    writer.write(3, {"loss": 7.0})
    writer.close()
    assert read_metrics(str(tmp_path)) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 7.0}]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_flops_of_the_7b_decoder():
    """2 FLOPs per weight and token forward, 4 more backward when everything trains; two experts at top-1 cost no more than one."""
    model, tokens = ModelConfig(), 2 * 1024
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32267
    decoder = step_flops(model, 2, 1024, images=0, masks=0, trainable_share=1.0)
    attention = (
        3 * 2 * 32 * 2 * (1024**2 / 2) * 2 * 4096
    )  # forward and twice that backward; scores and values; causal half
    assert abs(decoder / (6 * weights * tokens + attention) - 1) < 1e-6
    experts = dataclasses.replace(model, moe=MoeConfig(num_experts=2))
    assert step_flops(experts, 2, 1024, 0, 0, 1.0) == decoder
    assert step_flops(model, 2, 1024, 0, 0, 0.0) < 0.7 * decoder < decoder < step_flops(model, 2, 1024, 1, 1, 1.0)


def test_clip_flops_are_those_of_23_layers_of_vit_l():
    with_image = step_flops(ModelConfig(), 1, 640, 1, 0, 0.0) - step_flops(ModelConfig(), 1, 640, 0, 0, 0.0)
    assert 3.3e11 < with_image < 3.9e11  # ViT-L/14-336 is about 191 G multiply-adds with all 24 layers


def test_goodput_leaves_out_start_up_and_compiling(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    now[0] += 10  # start-up
    clock.begin_training()
    now[0] += 35  # one step, of which 30 s were compiling
    clock.lose(30)
    assert clock.seconds_per_step() == 5
    now[0] += 5
    assert clock.seconds_per_step() == 5 and clock.goodput() == pytest.approx(10 / 50)


def test_a_device_without_a_known_peak_has_no_mfu():
    assert mfu(1e12, 1.0) is None
