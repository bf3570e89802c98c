"""The files at the top: what continuous integration runs, and that what they name is there."""

import re

import yaml

from tests.paths import ROOT


def test_files_that_contributing_names_are_there():
    named = re.findall(
        r"`((?:configs|medplib_jax|convert|tests|launch)/[\w/.]+|pyproject\.toml)`",
        (ROOT / "CONTRIBUTING.md").read_text(),
    )
    assert len(named) > 10 and not [name for name in named if not (ROOT / name).exists()]


def test_continuous_integration_covers_both_pythons_and_the_bounds_of_jax():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["pinned"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    lowest, upper = re.search(r"jax>=([\d.]+),<([\d.]+)", (ROOT / "setup.cfg").read_text()).groups()
    assert [case["jax"] for case in jobs["jax"]["strategy"]["matrix"]["include"]] == [f"jax=={lowest}", f"jax<{upper}"]
    assert f"jax=={lowest}\n" in (ROOT / "launch/requirements.txt").read_text()


def test_hooks_have_the_version_of_ruff_that_the_tests_have():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pinned = re.search(r"^ruff==.*$", (ROOT / "launch/requirements-test.txt").read_text(), re.M).group()
    assert {name for hook in hooks for name in hook["additional_dependencies"]} == {pinned}
