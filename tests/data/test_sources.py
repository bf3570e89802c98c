"""Records are checked, and a bad one is named by file and index."""

import json
import os
import pickle

import pytest

from medplib_jax.data.errors import DataError
from medplib_jax.data.records import modality, parse_record
from medplib_jax.data.sources import MecovqaSource, digest, open_source
from medplib_jax.data.splits import annotation_files


def conversation(question="<image>\nWhat is it?", answer="A liver."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def parse(raw):
    return parse_record(raw, "train.json", 7, "data")


def test_a_record_keeps_its_references_and_texts():
    record = parse(
        {
            "image": "a.png",
            "conversations": conversation(answer="It is <SEG>.<mask>m.png</mask>"),
            "answer_type": "open",
        }
    )
    assert record.images == ("a.png",)
    assert record.turns == (("human", "<image>\nWhat is it?"), ("gpt", "It is <SEG>.<mask>m.png</mask>"))
    assert record.answer_type == "open"


def test_a_greeting_is_left_out_and_numbers_become_text():
    turns = [{"from": "gpt", "value": "Hello."}, *conversation("How many?", 3)]
    record = parse({"conversations": turns})
    assert record.turns == (("human", "How many?"), ("gpt", "3"))
    assert record.images == ()


VOLUME = {"name": "v", "slice": 0, "slices": 2, "spacing": [1.0, 1.0, 1.0], "size": [4, 4]}


@pytest.mark.parametrize(
    "change",
    [
        {"spacing": [1.0, float("nan"), 1.0]},
        {"spacing": [1.0, 1.0, float("inf")]},
        {"spacing": [1.0, 0.0, 1.0]},
        {"size": [4, 0]},
        {"slice": 2},
        {"size": [4]},
    ],
)
def test_a_volume_without_measures_is_named(change):
    record = {"image": "a.png", "conversations": conversation()}
    assert parse(record | {"volume": VOLUME}).volume.spacing == (1, 1, 1)
    with pytest.raises(DataError, match="train.json, record 7: volume (cannot be read|has no such slice)"):
        parse(record | {"volume": VOLUME | change})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (["a"], "not a record; expected an object, found list"),
        ({"image": "a.png"}, "record without conversations; expected a list of turns, found None"),
        ({"conversations": []}, "record without conversations"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "unknown role; expected human or gpt, found 'user'"),
        ({"conversations": ["x"]}, "unknown role"),
        ({"conversations": [{"from": "human"}]}, "turn without text"),
        (
            {"conversations": conversation() + conversation()[1:]},
            "roles do not alternate; expected human in turn 2, found gpt",
        ),
        ({"conversations": [{"from": "gpt", "value": "Hello."}]}, "record without a question"),
        ({"conversations": conversation(answer=" ")}, "empty answer"),
        ({"conversations": conversation(question="")}, "empty question"),
        (
            {"conversations": conversation(answer="It is <SEG>.")},
            "<SEG> and masks do not pair up; expected 1 <mask> for 1 <SEG>, found 0",
        ),
        ({"conversations": conversation(answer="It.<mask>m.png</mask>")}, "expected 0 <mask> for 0 <SEG>, found 1"),
        (
            {"conversations": conversation(answer="<SEG><mask>a</mask><mask>b</mask>")},
            "expected 1 <mask> for 1 <SEG>, found 2",
        ),
        ({"conversations": conversation(answer="<SEG><mask></mask>")}, "without a reference"),
        ({"conversations": conversation(question="<region> </region>?")}, "without a reference"),
        ({"conversations": conversation(question="<mask>m.png</mask>?")}, "mask in a question"),
        ({"conversations": conversation(answer="<image>")}, "image in an answer"),
        (
            {"image": 3, "conversations": conversation()},
            "image is not a path; expected a path or a list of paths, found 3",
        ),
        ({"image": ["a.png", ""], "conversations": conversation()}, "image is not a path"),
        ({"image": {}, "conversations": conversation()}, "image is not a path"),
        ({"image": "a\ud800.png", "conversations": conversation()}, "image is not a path"),
        ({"conversations": conversation(answer=True)}, "turn without text"),
        ({"conversations": conversation(answer=float("nan"))}, "turn without text"),
        ({"conversations": conversation(answer="\udc00")}, "text is not Unicode"),
        ({"conversations": conversation(answer="<SEG><mask>m.png")}, "<mask> is not closed"),
        ({"conversations": conversation(question="<region>m.png?")}, "<region> is not closed"),
        (
            {"conversations": conversation(), "answer_type": 3},
            "unknown answer type; expected open, closed, .*, found 3",
        ),
        ({"conversations": conversation(), "answer_type": "essay"}, "unknown answer type; .*, found 'essay'"),
    ],
)
def test_a_bad_record_is_named(raw, message):
    with pytest.raises(DataError, match=message) as caught:
        parse(raw)
    assert str(caught.value).startswith("train.json, record 7: ")
    assert (caught.value.file, caught.value.record) == ("train.json", 7)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("CLOSED ", "closed"), ("open-ended", "open"), ("yes_no", "closed"), ("Yes/No", "closed"), (None, "")]
    + [("multi-choice", "closed"), ("Multiple Choice", "closed"), ("number", "open"), ("", "")],
)
def test_known_names_of_answer_types_become_open_or_closed(written, expected):
    assert parse({"conversations": conversation(), "answer_type": written}).answer_type == expected


def test_errors_cross_process_borders():
    error = DataError("train.json", 7, "empty answer", "some text", "''")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "train.json, record 7: empty answer; expected some text, found ''"
    assert json.dumps(copy.as_dict())
    assert str(DataError("a.png", None, "gone").in_record("train.json", 7)) == "train.json, record 7: gone (a.png)"


def test_a_file_of_records(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"conversations": conversation()}] * 3))
    source = pickle.loads(pickle.dumps(MecovqaSource(str(path))))
    assert len(source) == 3
    assert (source[2].index, source[2].root) == (2, str(tmp_path))
    assert MecovqaSource(str(path), "elsewhere")[0].root == "elsewhere"


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.jsonl", "a.JSONL", "a#b.json", "a, b.json"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_every_spelling_of_an_annotation_file_is_a_source(tmp_path, name, encoding):
    raw = {"conversations": conversation(answer="A \u809d.\u2028")}
    lines = "\n".join(json.dumps(raw, ensure_ascii=False) for _ in range(2)) + "\n"
    path = tmp_path / name
    path.write_text(lines if name.lower().endswith("l") else json.dumps([raw] * 2), encoding=encoding)
    (tmp_path / "manifest.json").write_text("{}")
    assert annotation_files(str(tmp_path)) == ([str(path)], [str(tmp_path / "manifest.json")])
    source = open_source(str(path))
    assert len(source) == 2 and source[1].turns[1][1] == "A \u809d.\u2028"


def test_files_of_subfolders_are_found_when_asked_for(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.jsonl").write_text(json.dumps({"conversations": conversation()}))
    assert annotation_files(str(tmp_path)) == ([], [])
    assert annotation_files(str(tmp_path), deep=True) == ([str(tmp_path / "x/a.jsonl")], [])


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"conversations": []}\n\n{"conv')
    with pytest.raises(DataError, match="a.jsonl: annotation file cannot be read.* found line 3"):
        open_source(str(tmp_path / "a.jsonl"))


def test_a_digest_changes_with_every_file_that_a_record_names(tmp_path):
    answer = "It is <SEG>.<mask>mask.png</mask>"
    turns = conversation("<image>\nWhat is in <region>region.png</region>?", answer)
    (tmp_path / "a.json").write_text(json.dumps([{"image": "image.png", "conversations": turns}, {"image": 3}]))
    files = [tmp_path / name for name in ("image.png", "mask.png", "region.png")]
    for file in files:
        file.write_bytes(b"first")
    source = open_source(str(tmp_path / "a.json"))
    first = digest(source, range(2))
    assert digest(open_source(str(tmp_path / "a.json")), range(2)) == first != digest(source, range(1))
    for file in files:
        status = file.stat()
        file.write_bytes(b"other")  # as long as before, and as old
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        changed = digest(source, range(2))
        file.unlink()
        assert len({first, changed, digest(source, range(2))}) == 3
        file.write_bytes(b"first")
    assert digest(source, range(2)) == first


def test_a_digest_changes_with_what_figures_are_grouped_by(tmp_path):
    found = set()
    for told in ({}, {"patient": "1"}, {"patient": "2"}, {"structure": "liver"}, {"spacing": [1, 1]}):
        record = {"image": "image.png", "conversations": conversation("<image>\nWhat is it?", "A liver."), **told}
        (tmp_path / "a.json").write_text(json.dumps([record]))
        found.add(digest(open_source(str(tmp_path / "a.json")), range(1)))
    assert len(found) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "annotation file cannot be read"), ("{}", "not a list of records; expected a JSON list, found dict")],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"train.json: {message}"):
        MecovqaSource(str(path))
    with pytest.raises(DataError, match="gone.json: annotation file cannot be read"):
        MecovqaSource(str(tmp_path / "gone.json"))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "secret.png").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").touch()
    os.symlink(tmp_path / "secret.png", tmp_path / "data" / "link.png")
    os.symlink(tmp_path, tmp_path / "data" / "up")
    return tmp_path / "data"


def at(root):
    return parse_record({"conversations": conversation()}, "train.json", 7, str(root))


@pytest.mark.parametrize("reference", ["a.png", "a", "./a.png"])
def test_paths_are_found_and_the_suffix_is_tried(root, reference):
    assert at(root).path(reference) == str(root / "a.png")


@pytest.mark.parametrize(
    "reference", ["../secret.png", "link.png", "link", "up/secret.png", "/etc/hostname", "../gone.png"]
)
def test_paths_do_not_leave_the_root(root, reference):
    with pytest.raises(DataError, match="record 7: path leaves the data folder"):
        at(root).path(reference)


def test_missing_files_are_named(root):
    with pytest.raises(DataError, match=r"file is missing; expected .*/b.png"):
        at(root).path("b.png")
    with pytest.raises(DataError, match="not a path"):
        at(root).path("a\0.png")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("images/ct_00--AbdomenCT1K--Case_00220--x_0359.png", "ct"),
        ("images/x_ray_00--biomedparse--16.png", "x_ray"),
        ("images/x_00--chest.png", "x_ray"),
        ("x_1.png", "x_ray"),
        ("dermoscopy_3.png", "dermoscopy"),
    ],
)
def test_modality_comes_from_the_file_name(image, expected):
    assert modality(image) == expected


def test_what_a_question_is_about_is_said_or_named_once():
    def structure(question, **fields):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]
        return parse_record({"conversations": turns} | fields, "f", 0, "").structure

    assert structure("Where is <ref>the liver</ref>?") == "the liver" and structure("Where is it?") == ""
    assert structure("Are <ref>liver</ref> and <ref>spleen</ref> there?") == ""
    assert structure("Where is <ref>it</ref>?", structure=" left kidney ") == "left kidney"
    assert structure("Where is it?", structure=3) == ""
