"""Every builder as a user starts it: with a wrong folder it says what was expected, in one line, and fails."""

import sys

import pytest

from medplib_jax.datasets import import_dataset, sa_med2d, slices, write_qa
from medplib_jax.datasets.assemble import __main__ as assemble
from medplib_jax.datasets.audit import __main__ as audit

COMMANDS = {
    "assemble": (
        assemble,
        ["--annotations", "EMPTY", "--images", "EMPTY", "--out", "OUT"],
        "images/ or SAMed2Dv1/images/",
    ),
    "audit": (audit, ["EMPTY"], "annotation files"),
    "import_dataset": (import_dataset, ["--dataset", "slake", "--source", "EMPTY", "--out", "OUT"], "train.json"),
    "sa_med2d": (sa_med2d, ["--source", "EMPTY", "--out", "OUT"], "images/ and masks/"),
    "slices": (slices, ["--source", "EMPTY", "--out", "OUT", "--modality", "CT"], "no scans"),
    "slices, wrong option": (
        slices,
        ["--source", "EMPTY", "--out", "OUT", "--modality", "CT", "--every", "0"],
        "at least 1",
    ),
    "write_qa": (write_qa, ["--pairs", "EMPTY", "--out", "OUT"], "no images"),
    "write_qa, wrong option": (write_qa, ["--pairs", "EMPTY", "--out", "OUT", "--test-share", "2"], "[0, 1]"),
    "write_qa, options without Beam": (
        write_qa,
        ["--pairs", "EMPTY", "--out", "OUT", "--beam_options=--direct_num_workers=2"],
        "--beam_options: expected with --beam_runner",
    ),
    "write_qa, processes beside Beam": (
        write_qa,
        ["--pairs", "EMPTY", "--out", "OUT", "--workers", "4", "--beam_runner=DirectRunner"],
        "--workers: expected without --beam_runner, found 4",
    ),
    "write_qa, no address": (write_qa, ["--pairs", "EMPTY", "--out", "OUT", "--writer", "llm"], "expected an address"),
    "write_qa, no JSON": (
        write_qa,
        [
            "--pairs",
            "EMPTY",
            "--out",
            "OUT",
            "--writer",
            "llm",
            "--endpoint",
            "http://a/v1",
            "--model",
            "m",
            "--request",
            "{",
        ],
        "Expecting property name",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_folder_or_option_is_named_in_the_last_line(name, tmp_path, monkeypatch, capsys):
    module, arguments, message = COMMANDS[name]
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "OUT": str(tmp_path / "out")}
    monkeypatch.setattr(sys, "argv", [name, *(places.get(argument, argument) for argument in arguments)])
    assert module.main() == 1
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1] and "Traceback" not in printed.err and not printed.out


def test_beam_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["write_qa", "--pairs", "x", "--out", str(tmp_path), "--beam_runner=FlinkRunner"])
    assert write_qa.main() == 1
    assert capsys.readouterr().err.startswith("--beam_runner=FlinkRunner: Apache Beam is not installed here: pip inst")
