"""Apache Beam makes what the local processes make, byte for byte, and goes on where it was killed.

Its packages want older versions of others than the tests have pinned: these run in an environment of their own
(`pip install -e '.[test,beam]'`), and are skipped where Beam is not installed.
"""

import functools
import json
import os
import types
from pathlib import Path

import pytest

from medplib_jax.datasets import beam, write_qa
from medplib_jax.datasets.assemble.dataset import assemble
from medplib_jax.datasets.audit.collect import audit
from medplib_jax.datasets.index import build, library_of_pairs
from medplib_jax.datasets.processes import HERE, Keeping, Workers, map_shards
from tests.datasets import collection
from tests.datasets.qa.folders import make_pairs
from tests.datasets.test_index import add_picture

pytestmark = pytest.mark.slow
pytest.importorskip("apache_beam")
TWO = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
BEAM = Workers(runner="DirectRunner", options=TWO)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file, with the folder's own name left out of what is in it."""
    files, own = (path for path in folder.rglob("*") if path.is_file()), str(folder).encode()
    return {str(path.relative_to(folder)): path.read_bytes().replace(own, b"OUT") for path in files}


def test_assemble(tmp_path, monkeypatch):
    monkeypatch.setattr("medplib_jax.datasets.assemble.dataset.RECORDS_PER_SHARD", 2)
    folders = collection.make_annotations(tmp_path / "MeCoVQA"), collection.make_images(tmp_path / "SA-Med2D-20M")
    for name, workers in {"local": Workers(2), "beam": BEAM, "again": BEAM}.items():
        assemble(*map(str, folders), str(tmp_path / name), workers)
    assemble(*map(str, folders), str(tmp_path / "again"), BEAM)
    assert files_of(tmp_path / "local") == files_of(tmp_path / "beam") == files_of(tmp_path / "again")


def make_qa(pairs: str | Path, out: Path, workers: Workers) -> dict[str, bytes]:
    write_qa.write_qa(str(pairs), str(out), write_qa.TemplateWriter(0), write_qa.QaOptions(), workers)
    return files_of(out)


def test_write_qa_and_audit(tmp_path, monkeypatch):
    monkeypatch.setattr("medplib_jax.datasets.qa.folder._SHARD", 2)
    monkeypatch.setattr("medplib_jax.datasets.audit.collect.CHUNK", 3)
    pairs = make_pairs(tmp_path / "pairs", 9)
    made = make_qa(pairs, tmp_path / "beam", BEAM)
    assert made == make_qa(pairs, tmp_path / "local", HERE) and len(made) > 10
    folder = str(tmp_path / "beam")
    assert audit(folder, workers=BEAM, beam_folder=str(tmp_path / "found")) == audit(folder, workers=Workers(2))
    assert not (tmp_path / "found").exists() and not (tmp_path / "beam/.beam").exists()


def test_what_a_killed_run_left_is_used_only_where_nothing_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("medplib_jax.datasets.qa.folder._SHARD", 2)
    pairs, out = Path(make_pairs(tmp_path / "pairs", 8)), tmp_path / "out"
    with monkeypatch.context() as killed:
        killed.setattr(beam, "shutil", types.SimpleNamespace(rmtree=lambda folder: None))  # as if it had ended before
        make_qa(pairs, out, BEAM)
        before = {path: path.stat().st_mtime_ns for path in sorted((out / ".beam").glob("*.result"))}
        mask = sorted(pairs.glob("masks/*/*.png"))[0]
        mask.write_bytes(sorted(pairs.glob("masks/*/*.png"))[-1].read_bytes())
        os.utime(mask, ns=(1, 1))
        make_qa(pairs, out, BEAM)
        after = {path: path.stat().st_mtime_ns for path in before}
    assert len(before) > 2 and sum(after[path] != before[path] for path in before) == 1
    assert make_qa(pairs, out, BEAM) == make_qa(pairs, tmp_path / "fresh", HERE)


def test_index(workdir, tmp_path):
    for number in range(5):
        add_picture(tmp_path / "pairs", f"p{number:02d}", number)
    library = library_of_pairs(str(tmp_path / "pairs"))
    for name, workers in {"local": HERE, "beam": BEAM}.items():
        assert build(library, str(tmp_path / name), str(workdir), 2, workers)["embedded_now"] == 5
    assert files_of(tmp_path / "local") == files_of(tmp_path / "beam")


def square_or_fail(folder: str, number: int) -> int:
    if number == 3 and os.path.exists(os.path.join(folder, "fail")):
        raise OSError("disk full")
    with open(os.path.join(folder, f"made{number}"), "a") as file:
        file.write(f"{os.getpid()}\n")
    return number**2


def test_a_failure_is_one_line_and_finished_shards_are_not_made_again(tmp_path):
    (tmp_path / "fail").touch()
    make, keeping = functools.partial(square_or_fail, str(tmp_path)), Keeping(str(tmp_path / "kept"), str)
    numbers = range(12)
    with pytest.raises(RuntimeError, match=r"--beam_runner=DirectRunner: .*disk full") as caught:
        list(map_shards(make, numbers, Workers(runner="DirectRunner"), keeping))
    assert "\n" not in str(caught.value)
    done = {path.name: path.read_text() for path in tmp_path.glob("made*")}
    (tmp_path / "fail").unlink()
    assert list(map_shards(make, numbers, BEAM, keeping)) == [number**2 for number in numbers]
    assert len(done) < 12 and {name: (tmp_path / name).read_text() for name in done} == done
    assert len({path.read_text() for path in tmp_path.glob("made*") if path.name not in done}) == 2  # processes


def test_a_runner_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="--beam_runner=NoRunner: "):
        Workers(runner="NoRunner")


def test_the_command_passes_options_on(tmp_path, monkeypatch, capsys):
    pairs = make_pairs(tmp_path / "pairs", 5)
    words = ["--pairs", pairs, "--out", str(tmp_path / "out"), "--beam_runner=DirectRunner"]
    monkeypatch.setattr("sys.argv", ["write_qa", *words, f"--beam_options={' '.join(TWO)}"])
    assert write_qa.main() == 0
    assert json.loads(capsys.readouterr().out)["images"] > 3
