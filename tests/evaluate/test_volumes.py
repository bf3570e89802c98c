"""Whole volumes in a sweep: slices are put together, and what is missing or empty counts as said."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from medplib_jax.config.sweep import SweepConfig, TaskConfig
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import parse_record
from medplib_jax.data.rle import encode_rle
from medplib_jax.datasets.slices import QUESTIONS, SliceOptions, make_slices
from medplib_jax.evaluate import in_training
from medplib_jax.evaluate.kinds import find_kind
from medplib_jax.evaluate.kinds.volume import TOLERANCE_MM
from medplib_jax.evaluate.metrics import values
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.rescore import rescore
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.evaluate.tasks import folder_tasks, read_task
from medplib_jax.volumes.metrics import volume_scores
from tests.evaluate.evaluators import tiny
from tests.volumes.scans import some_values, write_nifti

SPACING = [3.0, 1.0, 1.5]


def ball(shape=(9, 20, 16), centre=(4, 9, 8), radius=4.0) -> np.ndarray:
    grid = np.indices(shape)
    return sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) < radius**2


def rows(name: str, truth: np.ndarray, drawn: np.ndarray, start: int = 0) -> list[dict]:
    """The lines of one structure in one volume."""
    where = {"name": name, "slices": len(truth), "spacing": SPACING, "size": list(truth.shape[1:])}
    found = []
    for number, (true, mask) in enumerate(zip(truth, drawn, strict=True)):
        line = {"record": start + number, "structure": "liver", "modality": "ct", "volume": where | {"slice": number}}
        line |= {name: [encode_rle(one)] if one.any() else [] for name, one in (("masks", mask), ("true_masks", true))}
        scores = {"dice": 0.0, "iou": 0.0, "target": float(true.any()), "drawn": float(mask.any()), "masks": 0.0}
        found.append(line | {"scores": scores | {"intersection": 0.0, "union": 0.0}})
    return found


def measured(*volumes: list[dict]) -> dict[str, float]:
    lines = [line for volume in volumes for line in volume]
    return values(find_kind("volume").statistics(lines, "exact"))


def test_a_volume_is_scored_as_one():
    truth, drawn = ball(), ball(centre=(5, 10, 8))
    found, expected = measured(rows("a", truth, drawn)), volume_scores(truth, drawn, SPACING, TOLERANCE_MM)
    for name in ("dice", "nsd_2mm", "hd95", "assd", "instance_f1"):
        assert found[f"volume_{name}"] == pytest.approx(expected[name], abs=1e-12)
    assert found["volume_complete"] == found["volume_found"] == 1


def test_the_error_in_millilitres_is_that_of_voxels_and_spacing():
    whole = ball()
    half = whole.copy()
    half[: len(half) // 2] = False
    voxel = float(np.prod(SPACING)) / 1000
    missing = (whole.sum() - half.sum()) * voxel
    assert missing > 0 and measured(rows("a", whole, half))["volume_ml_error"] == pytest.approx(missing)
    assert measured(rows("a", half, whole))["volume_ml_error"] == pytest.approx(missing)  # too much is an error, too
    shrunk = [line | {"volume": line["volume"] | {"size": [40, 32]}} for line in rows("a", whole, half)]
    assert measured(shrunk)["volume_ml_error"] == pytest.approx(4 * missing)


def test_the_order_of_records_does_not_matter():
    lines = rows("a", ball(), ball(centre=(5, 10, 8)))
    assert measured(lines) == measured([lines[k] for k in np.random.default_rng(0).permutation(len(lines))])


def test_empty_volumes_count_as_said():
    truth, nothing = ball(), np.zeros((9, 20, 16), bool)
    found = measured(rows("a", truth, truth), rows("b", truth, nothing), rows("c", nothing, truth))
    assert found["volume_dice"] == found["volume_nsd_2mm"] == pytest.approx(1 / 3)
    assert found["volume_hd95"] == found["volume_assd"] == 0  # of the first alone
    assert found["volume_found"] == 0.5 and found["volume_no_target_accuracy"] == 0
    found = measured(rows("c", nothing, nothing))
    assert found["volume_no_target_accuracy"] == 1 and "volume_dice" not in found


def test_a_volume_that_lacks_a_slice_is_counted_and_left_out():
    found = measured(rows("a", ball(), ball()), rows("b", ball(), ~ball())[:-1])
    assert found["volume_complete"] == 0.5 and found["volume_dice"] == 1


def test_volumes_are_measured_while_a_run_trains(monkeypatch, tmp_path):
    truth, drawn = ball(), ball(centre=(5, 10, 8))
    monkeypatch.setattr(in_training, "answers", lambda *_: iter(rows("a", truth, drawn)))
    task = SimpleNamespace(name="scans", kind="volume", records=range(9), config=TaskConfig("scans", "scans.json"))
    run = SimpleNamespace(_config=tiny.make_experiment(tmp_path))
    found = in_training.HeldOutFigures._metrics(run, None, task, 1)
    assert found["volume_dice"] == pytest.approx(volume_scores(truth, drawn, SPACING, TOLERANCE_MM)["dice"])


def test_masks_of_shrunk_pictures_keep_their_millimetres():
    truth, drawn = ball(), ball(centre=(5, 10, 8))
    lines = rows("a", truth, drawn)
    small = measured([line | {"volume": line["volume"] | {"size": [40, 32]}} for line in lines])
    expected = volume_scores(truth, drawn, [3.0, 2.0, 3.0], TOLERANCE_MM)
    assert small["volume_hd95"] == pytest.approx(expected["hd95"])


@pytest.mark.parametrize("change", [{"slice": 9}, {"spacing": [1, 2]}, {"spacing": [0, 1, 1]}, {"slices": "many"}])
def test_a_record_of_no_volume_is_refused(change):
    where = {"name": "a", "slice": 0, "slices": 9, "spacing": SPACING, "size": [20, 16]} | change
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]
    with pytest.raises(DataError, match="volume"):
        parse_record({"image": "a.png", "conversations": turns, "volume": where}, "f", 0, "")


def test_slices_are_asked_as_volumes_and_swept(tmp_path):
    source = tmp_path / "scans"
    for number in range(2):
        write_nifti(source / f"images/{number}.nii.gz", some_values((12, 14, 4), number), np.diag([1, 1, 3, 1.0]))
        mask = np.zeros((12, 14, 4), np.uint8)
        mask[2:7, 3:9, 1:3] = 1
        write_nifti(source / f"masks/{number}/liver.nii.gz", mask, np.diag([1, 1, 3, 1.0]))
    with pytest.raises(ValueError, match="expected --negatives"):
        SliceOptions(questions=True)
    make_slices(str(source), str(tmp_path / "slices"), SliceOptions(modality="CT", negatives=True, questions=True))
    records = json.loads((tmp_path / "slices" / QUESTIONS).read_text())
    assert len(records) == 8 and sum("<SEG>" in record["conversations"][1]["value"] for record in records) == 4
    (task,) = folder_tasks(tmp_path / "slices")
    assert read_task(task, 0, "raise").kind == "volume"
    tiny.write_checkpoint(tmp_path / "run")
    result = run_sweep(
        SweepConfig(checkpoints=str(tmp_path / "run"), tasks=(task,), on_error="raise"), tmp_path / "out"
    )
    (cell,) = result.cells
    assert cell.metrics["volume_complete"] == 1 and "volume_found" in cell.metrics and "mDice" in cell.metrics
    naive = {cell.checkpoint: cell.metrics for cell in rescore(tmp_path / "out").cells if cell.checkpoint != "run"}
    assert naive["empty mask"]["volume_dice"] == 0 and naive["whole image"]["volume_found"] == 1
    page = write_sweep_report(tmp_path / "out").read_text()
    assert "volume found" in page
