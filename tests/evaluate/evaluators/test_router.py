"""The router split: kinds of tokens, counts of choices, and both against the model's own choices while it answers."""

import functools

import jax
import numpy as np
import pytest

from medplib_jax.batch import Batch
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.decode.token_kinds import TOKEN_KINDS, count_choices, token_kinds
from medplib_jax.evaluate.evaluators import router
from medplib_jax.models.layers import abstract_module, bind, draw_params
from medplib_jax.models.medplib import MedPLIB
from tests.evaluate.evaluators import tiny


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """(experiment, tokenizer, prompts of the two region questions)."""
    folder = tiny.write_data(tmp_path_factory.mktemp("data") / "root")
    experiment = tiny.make_experiment(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = Tokenizer.load(experiment.data.tokenizer)
    loader = Loader(
        [MecovqaSource(str(folder / "test" / "region.json"), str(folder))], tokenizer, experiment.data, experiment.model
    )
    return experiment, tokenizer, Batch(**loader.load_eval([0, 1], [0, 1], question=True)[0])


def test_kinds_are_told_apart(setup):
    experiment, tokenizer, prompts = setup
    prompts.tokens[0, 0] = tokenizer.seg_id
    patches = experiment.model.clip.num_patches
    regions = range(patches, patches + 1)
    arguments = (prompts.tokens, prompts.feature_index, prompts.valid)
    kinds = np.asarray(token_kinds(*arguments, regions, tokenizer.seg_id))
    prompts.tokens[0, 0] = tokenizer.bos_id
    counts = [[int((row == kind).sum()) for kind in range(4)] for row in kinds]
    assert [row[1:] for row in counts] == [[patches, 1, 1], [patches, 1, 0]]
    behind = np.where(prompts.feature_index >= patches, prompts.feature_index + 1, prompts.feature_index)
    kinds = np.asarray(token_kinds(prompts.tokens, behind, prompts.valid, regions, tokenizer.seg_id))
    assert (kinds[0] == TOKEN_KINDS.index("image")).sum() == patches + 1, "the mask of an example is no region"
    assert [sum(row) for row in counts] == prompts.valid.sum(-1).tolist() and (kinds[~prompts.valid] == -1).all()


def test_counts_of_choices():
    expert_index = np.array([[[[0], [1], [1], [0]]], [[[2], [2], [2], [2]]]])  # 2 layers, 1 row, 4 positions, top 1
    counts = count_choices(expert_index, np.array([[0, 0, 3, -1]]), num_experts=3)
    assert counts.shape == (1, 2, 4, 3)
    assert counts[0, :, 0].tolist() == [[1, 1, 0], [0, 0, 2]] and counts[0, :, 3].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert counts.sum() == 6
    both = count_choices(np.array([[[[0, 2]]]]), np.array([[1]]), num_experts=3)
    assert both[0, 0, 1].tolist() == [1, 0, 1]


def test_choices_are_counted_while_answering(setup):
    experiment, tokenizer, prompts = setup
    model = experiment.model
    abstract = abstract_module(functools.partial(MedPLIB, model))
    params = draw_params(abstract, 1)
    made = Generator(
        model, params, DecodeOptions(max_new_tokens=3, max_masks=0), stop_ids=(-1,), seg_id=tokenizer.seg_id
    )(prompts)
    # one pass over prompts with their answers
    prompts = prompts.replace(tokens=prompts.tokens.copy(), valid=prompts.valid.copy())
    for row, start in enumerate(prompts.valid.sum(-1)):
        prompts.tokens[row, start : start + 3], prompts.valid[row, start : start + 3] = made.tokens[row], True
    _, out = jax.jit(lambda params, prompts: bind(abstract, params)(prompts))(params, prompts)
    regions = range(model.clip.num_patches, model.clip.num_patches + 1)
    kinds = token_kinds(prompts.tokens, prompts.feature_index, prompts.valid, regions, tokenizer.seg_id)
    np.testing.assert_array_equal(made.choices, count_choices(out["expert_index"], kinds, 2))

    rows = [
        {"modality": name, "router": counts}
        for name, counts in zip(("ct", "mr"), np.asarray(made.choices).tolist(), strict=True)
    ]
    summary = router.summarise(rows, model)
    assert summary["layers"] == [0, 1] and summary["tokens"] | {"text": 0} == {"text": 0, "image": 8, "region": 2}
    assert sum(summary["tokens"].values()) == prompts.valid.sum()
    for split in (summary, *summary["modalities"].values()):
        for kind, share in split["share"].items():
            np.testing.assert_allclose(np.sum(share, axis=-1), 1, err_msg=kind)
    assert summary["modalities"]["mr"]["tokens"]["image"] == 4
