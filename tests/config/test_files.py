"""Configuration files on the command line: paths are taken as they are, bare names are the package's."""

import subprocess
import sys

import pytest

from medplib_jax.config.files import find_config, load_config
from tests.paths import ROOT


def test_a_bare_name_is_the_packages_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("stage4_moe") == ROOT / "configs" / "stage4_moe.py"
    assert load_config("stage4_moe:tiny") == load_config(f"{ROOT}/configs/stage4_moe.py:tiny")
    with pytest.raises(
        ValueError, match="stage5: expected the path of a file, or one of bird_folder, bird_grit, common, eval_folder, "
    ):
        find_config("stage5")


def test_a_path_is_taken_as_it_is_and_knows_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sizes.py").write_text("STEPS = 3")
    (tmp_path / "mine-2.py").write_text("from . import sizes\ndef get_config(text='none'): return text, sizes.STEPS")
    assert load_config("mine-2.py") == ("none", 3)
    assert load_config("./mine-2.py:a:b") == ("a:b", 3)
    with pytest.raises(ValueError, match="stage4_moe.py: no such file"):
        load_config("stage4_moe.py:tiny")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_wrong_name_is_one_line(tmp_path, command):
    arguments = [sys.executable, "-m", f"medplib_jax.{command}", "--config=stage5:7b", f"--workdir={tmp_path}"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and "stage5: expected the path of a file" in done.stderr
