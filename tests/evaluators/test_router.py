"""The router split: kinds of tokens, answers behind prompts, and counts against the model's own choices."""

import functools

import numpy as np
import pytest

from medplib_jax.data.pipeline import Loader
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.data.tokenizer import Tokenizer
from medplib_jax.decode import Generation
from medplib_jax.evaluators import router
from medplib_jax.models.layers import abstract_module, draw_params
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.types import Batch
from tests.evaluators import tiny


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """(experiment, tokenizer, prompts of the two region questions, answers of 3 and 0 tokens)."""
    folder = tiny.write_data(tmp_path_factory.mktemp("data") / "root")
    experiment = tiny.make_experiment(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = Tokenizer.load(experiment.data.tokenizer)
    loader = Loader([MecovqaSource(str(folder / "test" / "region.json"), str(folder))], tokenizer, experiment.data, experiment.model)
    arrays, _ = loader.load_eval([0, 1], [0, 1], question=True)
    answer = np.array([[5, tokenizer.seg_id, 7, 0], [0, 0, 0, 0]], np.int32)
    return experiment, tokenizer, Batch(**arrays), Generation(answer, np.array([3, 0]), None, None, None)


def test_answers_stand_behind_their_prompts(setup):
    _, tokenizer, prompts, generation = setup
    batch = router.append_answers(prompts, generation)
    length = int(prompts.valid[0].sum())
    assert batch.tokens[0, length : length + 3].tolist() == [5, tokenizer.seg_id, 7]
    assert batch.valid.sum(-1).tolist() == [length + 3, int(prompts.valid[1].sum())]
    np.testing.assert_array_equal(batch.tokens[:, :length], prompts.tokens[:, :length])
    np.testing.assert_array_equal(batch.feature_index[:, length:], -1)
    assert batch.seg_position.shape == (2, 0) and batch.targets.shape == batch.tokens.shape


def test_kinds_are_told_apart(setup):
    experiment, tokenizer, prompts, generation = setup
    batch = router.append_answers(prompts, generation)
    kinds = router.token_kinds(batch, experiment.model.clip.num_patches, tokenizer.seg_id)
    counts = [[int((row == kind).sum()) for kind in range(4)] for row in kinds]
    assert [row[1:] for row in counts] == [[experiment.model.clip.num_patches, 1, 1], [experiment.model.clip.num_patches, 1, 0]]
    assert [sum(row) for row in counts] == batch.valid.sum(-1).tolist() and (kinds[~batch.valid] == -1).all()


def test_counts_of_choices():
    expert_index = np.array([[[[0], [1], [1], [0]]], [[[2], [2], [2], [2]]]])  # 2 layers, 1 row, 4 positions, top 1
    counts = router.count_choices(expert_index, np.array([[0, 0, 3, -1]]), num_experts=3)
    assert counts.shape == (1, 2, 4, 3)
    assert counts[0, :, 0].tolist() == [[1, 1, 0], [0, 0, 2]] and counts[0, :, 3].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert counts.sum() == 6
    both = router.count_choices(np.array([[[[0, 2]]]]), np.array([[1]]), num_experts=3)
    assert both[0, 0, 1].tolist() == [1, 0, 1]


def test_probe_counts_the_models_choices(setup):
    experiment, tokenizer, prompts, generation = setup
    model = experiment.model
    probe = router.RouterProbe(model, draw_params(abstract_module(functools.partial(MedPLIB, model)), 1), seg_id=tokenizer.seg_id)
    rows = probe(prompts, generation)
    batch = router.append_answers(prompts, generation)
    expert_index = np.asarray(probe._expert_index(probe.params, batch))[..., 0]
    total = np.sum(rows, axis=(0, 2))  # [layer, expert]
    for layer in range(2):
        assert total[layer].tolist() == np.bincount(expert_index[layer][batch.valid], minlength=2).tolist()

    summary = router.summarise(rows, model)
    assert summary["layers"] == [0, 1] and summary["tokens"] | {"text": 0} == {"text": 0, "image": 8, "region": 2, "SEG": 1}
    assert sum(summary["tokens"].values()) == batch.valid.sum()
    for kind, share in summary["share"].items():
        np.testing.assert_allclose(np.sum(share, axis=-1), 1, err_msg=kind)
    assert "SEG" not in router.summarise(rows[1:], model)["share"]
