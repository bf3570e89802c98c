"""From checkpoints' folders to the names that clients use, and the page's examples."""

import pytest

from medplib_jax.serve.start import EXAMPLES, _examples, named


def test_a_checkpoint_is_called_by_its_folder():
    assert named(["runs/demo/stage_IV/"]) == {"runs/demo/stage_IV/": "stage_IV"}


def test_folders_of_one_name_are_told_apart_by_what_is_above():
    assert list(named(["/a/x/s", "/b/x/s", "/b/y/t"]).values()) == ["a/x/s", "b/x/s", "b/y/t"]


def test_a_checkpoint_given_twice_is_refused():
    with pytest.raises(ValueError, match="different"):
        named(["/a/b", "/a/../a/b"])


def test_examples_are_pictures_of_a_folder_or_a_pattern(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02d}_{number % 2}.png").touch()
    (tmp_path / "notes.txt").touch()
    assert len(_examples(str(tmp_path))) == EXAMPLES
    assert {path.name[3] for path in _examples(str(tmp_path / "*_1.*"))} == {"1"}
    assert _examples(None) == []
    with pytest.raises(ValueError, match="found none"):
        _examples(str(tmp_path / "*.jpg"))
