import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.train.metrics_log import Clock, MetricWriter, read_metrics


def scalars(workdir) -> list[float]:
    """The values in the TensorBoard events."""
    (file,) = (workdir / "tensorboard").glob("events*")
    data, events = file.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[12 + length + 4 :]
    return [value.simple_value for event in events for value in event.summary.value]


def test_rows_after_the_resumed_step_and_half_written_ones_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo'
    )
    before = path.read_text()
    with pytest.raises(KeyError), MetricWriter(str(tmp_path), 2, ExperimentConfig()) as writer:
        assert path.read_text() == before  # a run that fails before it writes changes nothing
        writer.write(3, {"loss": 7.0})
        raise KeyError
    assert scalars(tmp_path) == [7.0]
    assert read_metrics(str(tmp_path)) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 7.0}]


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
