"""Files of predictions: what a kill leaves, which order the lines end in, and what is not mixed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medplib_jax.evaluate.evaluators.predictions import Shard, read_lines, read_rows

HEADER = {"task": "a", "checkpoint": "1"}


def test_lines_come_in_any_order_and_end_sorted(tmp_path):
    shard = Shard(tmp_path / "a.jsonl", HEADER, range(3))
    for record in (2, 0, 1):
        shard.add({"record": record, "answer": "é"} if record else {"record": 0, "skipped": {"what": "no image"}})
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == HEADER and [json.loads(line)["record"] for line in lines[1:]] == [0, 1, 2]
    assert [row["record"] for row in read_rows(tmp_path / "a.jsonl")] == [1, 2] and len(
        read_lines(tmp_path / "a.jsonl")
    ) == 3
    assert not shard.missing
    with pytest.raises(ValueError, match="record 1 has a line"):
        shard.add({"record": 1})


@settings(max_examples=40)
@given(order=st.permutations(range(5)), data=st.data())
def test_a_kill_at_any_byte_costs_no_more_than_a_line(tmp_path_factory, order, data):
    path = tmp_path_factory.mktemp("shard") / "a.jsonl"
    shard = Shard(path, HEADER, range(5))
    for record in order:
        shard.add({"record": record, "answer": "x" * record})
    whole = path.read_bytes()
    path.unlink()
    shard = Shard(path, HEADER, range(5))
    for record in order[:4]:
        shard.add({"record": record, "answer": "x" * record})
    cut = data.draw(st.integers(0, path.stat().st_size))
    path.write_bytes(path.read_bytes()[:cut])
    again = Shard(path, HEADER, range(5))
    for record in sorted(again.missing):
        again.add({"record": record, "answer": "x" * record})
    assert path.read_bytes() == whole


def test_predictions_of_another_run_are_not_mixed(tmp_path):
    Shard(tmp_path / "a.jsonl", HEADER, [0]).add({"record": 0})
    with pytest.raises(ValueError, match=r"a\.jsonl.*different checkpoint"):
        Shard(tmp_path / "a.jsonl", HEADER | {"checkpoint": "2"}, [0])
    assert not Shard(tmp_path / "a.jsonl", HEADER, [0]).missing
    assert Shard(tmp_path / "a.jsonl", HEADER, [0, 1]).missing == {1}  # more is asked than before
