"""TensorBoard's event files, read by another program's definition of them, and their checksums by another's sums."""

import struct

from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from medplib_jax.train.events import EventFile


def read_events(file: epath.Path) -> list[Event]:
    data, events = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        content = data[12 : 12 + length]
        sums = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + length : 16 + length])
        assert sums == (masked_crc32c(data[:8]), masked_crc32c(content))
        events.append(Event.FromString(content))
        data = data[16 + length :]
    return events


def test_another_program_reads_the_scalars(tmp_path):
    folder = epath.Path(tmp_path / "tensorboard")
    file = EventFile(folder, 301)
    written = {301: {"loss": 0.5, "grad_norm": float("inf")}, 2**40: {"x" * 200: -3.25e-7, "größe": 0.0}}
    for step, scalars in written.items():
        file.add(step, scalars)
        (path,) = folder.iterdir()
        assert read_events(path)[-1].step == step  # before it is closed
    file.close()
    version, start, *events = read_events(path)
    assert version.file_version == "brain.Event:2" and "tfevents" in path.name
    assert (start.step, start.session_log.status) == (301, SessionLog.START)
    found = {event.step: {value.tag: value.simple_value for value in event.summary.value} for event in events}
    assert found == {
        step: {k: struct.unpack("f", struct.pack("f", v))[0] for k, v in row.items()} for step, row in written.items()
    }
    assert start.wall_time > 1.7e9


def test_files_of_a_resumed_run_follow_in_the_order_of_their_names(tmp_path):
    for step in (1, 2):
        file = EventFile(epath.Path(tmp_path), step)
        file.add(step, {"loss": 0.0})
        file.close()
    assert [read_events(path)[-1].step for path in sorted(epath.Path(tmp_path).iterdir())] == [1, 2]
