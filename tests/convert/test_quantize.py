"""A checkpoint written in 8 bits answers as the first one does in 8 bits, and is refused for anything else."""

import chex
import pytest

from convert import quantize, to_torch
from medplib_jax import checkpoint
from medplib_jax.decode.loading import load_checkpoint
from tests.decode.test_loading import write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    first, small = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("small")
    write(first, 1)
    quantize.main(["--checkpoint", str(first), "--out", str(small)])
    return first, small


def test_it_answers_as_the_first_does_in_8_bits(folders):
    first, small = folders
    expected, found = load_checkpoint(first, quantize="int8"), load_checkpoint(small)
    assert found.quantize == "int8" and found.experiment.model.lora.rank == 0
    chex.assert_trees_all_equal(found.params, expected.params)
    chex.assert_trees_all_equal(load_checkpoint(small, quantize="int8").params, expected.params)


def test_a_second_time_is_refused(folders, tmp_path):
    with pytest.raises(SystemExit, match="its weights have 8 bits already"):
        quantize.main(["--checkpoint", str(folders[1]), "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def test_neither_training_nor_conversion_takes_it_for_a_whole_one(folders, tmp_path):
    with pytest.raises(ValueError, match="weights of 8 bits, which can only answer"):
        checkpoint.load_params(folders[1])
    with pytest.raises(ValueError, match="weights of 8 bits, which can only answer"):
        to_torch.convert(folders[1], tmp_path / "torch")
