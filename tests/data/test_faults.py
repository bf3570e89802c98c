"""Randomly broken records and files: each is named, none crashes a run, none is used silently.

FAULTS=5000 in the environment makes as many of them; the default is a quick sample.
"""

import collections
import json
import os

import numpy as np
import pytest

from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ClipConfig, MaskConfig, ModelConfig, RegionConfig
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.data.pipeline import make_loader, train_batches
from medplib_jax.datasets.assemble.dataset import assemble
from medplib_jax.datasets.audit.collect import audit
from medplib_jax.datasets.processes import HERE
from tests.data.faults import NOTED, REFUSED, Faults
from tests.paths import GOLDEN

COUNT, GOOD = int(os.environ.get("FAULTS", "250")), 40
MODEL = ModelConfig(clip=ClipConfig(image_size=28), mask=MaskConfig(image_size=32), region=RegionConfig(max_points=16))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder with `GOOD` good records, then `COUNT` broken ones; for each of those (outcome, fault)."""
    root = tmp_path_factory.mktemp("faults") / "data"
    faults = Faults(root, seed=COUNT)
    records, outcomes = [faults.good(index) for index in range(GOOD)], {}
    for index in range(GOOD, GOOD + COUNT):
        record, outcome, fault = faults.broken(index)
        records.append(record)
        outcomes[index] = outcome, fault
    (root / "train.json").write_text(json.dumps(records))
    return root, outcomes


def config(root, on_error):
    return DataConfig(
        sources=(str(root / "train.json"),),
        tokenizer=str(GOLDEN / "tokenizer"),
        bucket_lengths=(160,),
        batch_size=8,
        mask_canvas=64,
        on_error=on_error,
        workers=0,
    )


def check(outcomes, refused, noted, used):
    """Each broken record is named as it must be, and only a noted one is used."""
    assert outcomes
    wrong = [
        fault
        for index, (outcome, fault) in outcomes.items()
        if not (
            (outcome == REFUSED and index in refused and index not in used)
            or (outcome == NOTED and index in noted and index not in refused)
        )
    ]
    assert not wrong, collections.Counter(wrong).most_common()
    assert not {index for index in refused | noted if index < GOOD}


def test_training_names_every_fault_and_uses_none_silently(dataset):
    root, outcomes = dataset
    loader = make_loader(config(root, "skip"), MODEL)
    plan, problems = loader.plan(seed=0)
    batches = list(train_batches(loader, plan, range(8), 0, plan.steps_per_epoch, 0))
    errors = problems + [error for _, skipped in batches for error in skipped]
    noted = {error.record for error in errors if isinstance(error, Notice)}
    refused = {error.record for error in errors if not isinstance(error, Notice)}
    used = set(np.concatenate([arrays["record"] for arrays, _ in batches]).tolist())
    check(outcomes, refused, noted, used)
    assert set(range(GOOD)) <= used
    assert all(error.file == str(root / "train.json") and error.what for error in errors)


def test_on_error_raise_stops_at_the_fault(dataset):
    root, outcomes = dataset
    loader = make_loader(config(root, "raise"), MODEL)
    assert outcomes
    for index, (outcome, fault) in list(outcomes.items())[:: max(1, len(outcomes) // 60)]:
        if outcome == REFUSED:
            with pytest.raises(DataError) as caught:
                loader.load_eval([index], [0], False)
                loader.encode(loader.record(index))
            assert caught.value.record == index, fault
        else:
            loader.load_eval([index], [0], False)


def test_assembling_names_every_fault(dataset, tmp_path):
    root, outcomes = dataset
    manifest = assemble(str(root), str(root), str(tmp_path), HERE)
    problems = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert manifest["records"] == GOOD + COUNT == manifest["written"] + sum(manifest["left_out"].values())
    refused = {problem["record"] for problem in problems if problem["action"] == "left out"}
    noted = {problem["record"] for problem in problems if problem["action"] == "repaired"}
    # a picture with too many words is a matter of the model, and assembling repairs what it can
    mendable = {index for index, (_, fault) in outcomes.items() if fault == "text: too long" or index in noted}
    check({index: one for index, one in outcomes.items() if index not in mendable}, refused, noted, set())
    mended = collections.Counter(
        fault for index, (outcome, fault) in outcomes.items() if outcome == REFUSED and index in noted - refused
    )
    assert not mended, mended.most_common()


def test_the_audit_names_every_fault(dataset):
    root, outcomes = dataset
    report, _ = audit(str(root))
    named = collections.defaultdict(list)
    for finding in report["findings"]:
        named[finding["record"]].append(finding["kind"])
    lengths = {index for index, (_, fault) in outcomes.items() if fault == "text: too long"}  # depends on the model
    missed = [fault for index, (_, fault) in outcomes.items() if index not in named and index not in lengths]
    assert not missed, collections.Counter(missed).most_common()
