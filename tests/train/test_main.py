"""What the command line adds to the loop."""

import subprocess
import sys

import pytest

from medplib_jax.config.experiment import ExperimentConfig, TrainConfig
from medplib_jax.train.__main__ import epochs_asked_for
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (["--config.train.epochs=2"], 0),
        (["--config.train.epochs", "2"], 0),
        (["--config.train.epochs=2", "--config.train.steps=5"], 5),
        (["--config.optim.lr=2"], 5),
    ],
)
def test_epochs_on_the_command_line_win_over_the_configs_steps(arguments, steps):
    config = ExperimentConfig(train=TrainConfig(steps=5, epochs=2.0))
    assert epochs_asked_for(config, ["train", *arguments]).train.steps == steps


def test_a_wrong_path_is_one_line(tmp_path):
    command = [sys.executable, "-m", "medplib_jax.train", f"--config={ROOT}/configs/stage1_align.py:tiny"]
    (tmp_path / "empty").mkdir()
    arguments = [f"--workdir={tmp_path}/run", f"--config.data.tokenizer={tmp_path}/empty"]
    found = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith("error: data.tokenizer: no tokenizer files")
