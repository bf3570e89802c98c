"""A folder that is made again equals one that is made anew, and nobody else's file is touched."""

import os
import pathlib

import pytest

from medplib_jax.data.errors import DataError, Notice
from medplib_jax.datasets import files
from medplib_jax.datasets.files import LIST, Folder, files_below, safe_name


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_below(str(folder))}


def test_a_second_run_leaves_nothing_of_the_first(tmp_path):
    (tmp_path / "source.png").write_bytes(b"pixels")
    with Folder(str(tmp_path / "out"), "make") as folder:
        folder.write("old/a.png", b"1")
        folder.write("b.png", b"1")
        folder.link(str(tmp_path / "source.png"), "c.png")
    (tmp_path / "source.png").unlink()
    (tmp_path / "source.png").write_bytes(b"others")
    for out in ("out", "new"):
        with Folder(str(tmp_path / out), "make") as folder:
            folder.write("b.png", b"2")
            folder.link(str(tmp_path / "source.png"), "c.png")
    assert tree(tmp_path / "out") == tree(tmp_path / "new")
    assert tree(tmp_path / "out").keys() == {"b.png", "c.png", LIST} and not (tmp_path / "out/old").exists()
    assert os.path.samefile(tmp_path / "out/c.png", tmp_path / "source.png")


def test_what_a_killed_run_wrote_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), Folder(str(tmp_path / "out"), "make") as folder:
        folder.write("a.png", b"1")
        raise KeyboardInterrupt
    with Folder(str(tmp_path / "out"), "make") as folder:
        folder.write("b.png", b"1")
    assert tree(tmp_path / "out").keys() == {"b.png", LIST}


def test_a_file_of_the_same_content_keeps_its_age(tmp_path):
    for content in (b"1", b"1"):
        with Folder(str(tmp_path), "make") as folder:
            folder.write("a.png", content)
            os.utime(tmp_path / "a.png", ns=(5, 5))
    assert (tmp_path / "a.png").stat().st_mtime_ns == 5


def test_files_of_others_are_left_and_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "a.png").write_text("mine")
    with Folder(str(tmp_path), "make") as folder:
        folder.write("b.png", b"1")
        for write in (lambda: folder.write("a.png", b"1"), lambda: folder.link(str(tmp_path / "b.png"), "mine.txt")):
            with pytest.raises(DataError, match="not made by this command"):
                write()
    with Folder(str(tmp_path), "make"):
        pass
    assert tree(tmp_path).keys() == {"mine.txt", "a.png", LIST} and (tmp_path / "a.png").read_text() == "mine"


def test_another_command_or_source_is_refused(tmp_path):
    with Folder(str(tmp_path), "slices", str(tmp_path / "a")) as folder:
        folder.write("a.png", b"1")
    with pytest.raises(DataError, match="another command made; expected slices b, found slices a"):
        Folder(str(tmp_path), "slices", str(tmp_path / "b"))
    assert (tmp_path / "a.png").exists()


def test_a_list_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "secret").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LIST).write_text("# make\n../secret\nlink/secret\n")
    (tmp_path / "out/link").symlink_to(tmp_path)
    with Folder(str(tmp_path / "out"), "make"):
        pass
    assert (tmp_path / "secret").exists()


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    files.write_json(str(tmp_path / "a.json"), [1])
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_json(str(tmp_path / "a.json"), [2])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and "1" in (tmp_path / "a.json").read_text()


def test_problems_and_notices_are_counted_apart(tmp_path):
    with Folder(str(tmp_path), "make") as folder:
        found = folder.write_problems(
            [DataError("a", None, "gone"), Notice("b", None, "odd"), Notice("c", None, "odd")]
        )
    assert found == {"skipped": 1, "reasons": {"gone": 1}, "noted": {"odd": 2}}
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 3


def test_links_are_followed_but_not_in_circles(tmp_path):
    for name in ("a/b", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.png").touch()
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/again").symlink_to(tmp_path / "elsewhere")
    assert files_below(str(tmp_path / "a")) == ["again/x.png", "b/x.png", "other/x.png"]


@pytest.mark.parametrize(("name", "safe"), [("P 1", "P_1"), ("a/b#c<d>", "a--b-c-d-"), ("../x", "x"), ("", "unnamed")])
def test_names_are_made_safe(name, safe):
    assert safe_name(name) == safe
