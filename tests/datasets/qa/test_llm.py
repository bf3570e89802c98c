"""Questions from a language model: a local endpoint that answers well, badly, or not at all; and what is kept of the
answers."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from medplib_jax.data.sources import MecovqaSource
from medplib_jax.datasets import write_qa
from medplib_jax.datasets.audit.collect import audit
from medplib_jax.datasets.files import Folder
from medplib_jax.datasets.qa import chat, llm, llm_answers, llm_prompts
from medplib_jax.datasets.qa.folder import read_facts, scan
from medplib_jax.evaluate.metrics import parse_boxes
from tests.datasets.qa.folders import SHAPES, make_pairs
from tests.datasets.qa.server import describe, is_description, names_of, questions, sensible, serve
from tests.paths import ROOT

NAMES = ("liver", "left kidney", "cyst")


@pytest.fixture
def pairs(tmp_path):
    return make_pairs(tmp_path / "pairs")


@pytest.fixture
def facts(tmp_path, pairs):
    one, problems = read_facts(scan(pairs)[0][0], Folder(str(tmp_path / "facts"), "test"))
    assert not problems
    return one


def run(server, pairs, out, concurrency=4, **options):
    asked = chat.Chat(chat.Endpoint(server.url, "m", backoff=0.0, timeout=60.0), str(out / "answers"))
    return write_qa.write_qa(
        pairs,
        str(out),
        llm.LlmWriter(asked, 0, concurrency, (2.0, 8.0)),
        write_qa.QaOptions(**{"test_share": 0.5} | options),
    )


def files(out) -> dict[str, bytes]:
    found = [
        path for path in sorted(out.rglob("*.json")) if path.name != "manifest.json" and "answers" not in path.parts
    ]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def test_both_forms_are_written_and_can_be_read(tmp_path, pairs):
    with serve() as server:
        manifest = run(server, pairs, tmp_path / "out", seed=1)
    assert manifest["skipped"] == 0 and manifest["answers_paid"] == 6 and manifest["failed_tries"] == {}
    assert manifest["cost"] == pytest.approx(6 * (100 * 2 + 20 * 8) / 1e6)
    split_of = {
        split: sum(count for name, count in manifest["records"].items() if name == f"{split}/region.json")
        for split in ("train", "test")
    }
    assert sum(split_of.values()) == 9  # three images, three names
    for name in ("region", "grounding", "vqa"):
        for split in split_of:
            source = MecovqaSource(str(tmp_path / "out" / split / f"{name}.json"), str(tmp_path / "out"))
            assert len(source)
            for record in source:
                assert pathlib.Path(record.path(record.images[0])).is_file()
    report, _ = audit(str(tmp_path / "out"))
    assert report["usable"] == report["records"] and set(report["finding_counts"]) <= {"question asked twice"}
    mia = [
        turn
        for path in (tmp_path / "out/grit").rglob("MIA.json")
        for record in json.loads(path.read_text())
        for turn in record["conversations"]
    ]
    assert len(mia) == 3 and all(len(parse_boxes(answer)) == 4 and answer.count("<ref>") == 3 for _, answer in mia)


def test_a_second_run_pays_nothing_and_writes_the_same(tmp_path, pairs):
    with serve() as server:
        run(server, pairs, tmp_path / "out")
        before, asked = files(tmp_path / "out"), len(server.requests)
        manifest = run(server, pairs, tmp_path / "out", concurrency=1)
        assert (
            len(server.requests) == asked
            and manifest["answers_paid"] == manifest["cost"] == 0
            and manifest["answers_from_disk"] == 6
        )
    assert files(tmp_path / "out") == before


def test_answers_come_in_bounded_numbers_and_any_order(tmp_path):
    pairs = make_pairs(tmp_path / "pairs", 9)

    def slow_at_first(handler, messages, number):
        handler.server.closing.wait(0.02 if number % 2 else 0)
        return sensible(messages)

    with serve(slow_at_first) as server:
        run(server, pairs, tmp_path / "many", concurrency=3)
        assert server.most_at_once <= 3
    with serve() as server:
        run(server, pairs, tmp_path / "one", concurrency=1)
        assert server.most_at_once == 1
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_nonsense_is_complained_about_then_left_out(tmp_path, pairs):
    """The second image's description is never usable, the third one's comes at the second request."""
    descriptions = []

    def sulk(handler, messages, number):
        if not is_description(messages):
            return sensible(messages)
        kind = messages[1]["content"]
        descriptions.append(kind) if kind not in descriptions else None
        image, round_ = descriptions.index(kind), len(messages) // 2
        return "I cannot help with that." if image == 1 or (image == 2 and round_ == 1) else sensible(messages)

    with serve(sulk) as server:
        manifest = run(server, pairs, tmp_path / "out", concurrency=1)
    assert (
        manifest["reasons"] == {"no answer of the language model can be used": 1}
        and manifest["bad_answers"] == llm.ANSWERS + 1
    )
    assert manifest["records"].get("train/region.json", 0) + manifest["records"].get("test/region.json", 0) == 6
    (skipped,) = map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines())
    assert skipped["file"] == "images/ct_00--A--case_1--x_1.png" and "not one JSON object" in skipped["found"]
    complaints = [body["messages"][-1]["content"] for body, _ in server.requests if len(body["messages"]) > 2]
    assert len(complaints) == llm.ANSWERS and all("not one JSON object" in complaint for complaint in complaints)


def test_an_image_that_is_refused_is_named(tmp_path, pairs):
    def refuse(handler, messages, number):
        return handler.reply(b"content filter", 400) if number == 0 else sensible(messages)

    with serve(refuse) as server:
        manifest = run(server, pairs, tmp_path / "out", concurrency=1)
    assert manifest["reasons"] == {"the language model did not answer": 1} and manifest["answers_paid"] == 4


def test_a_dead_endpoint_ends_the_run(tmp_path):
    pairs = make_pairs(tmp_path / "pairs", 9, {"liver": SHAPES["liver"]})
    with (
        serve(lambda handler, messages, number: handler.reply(b"no such model", 404)) as server,
        pytest.raises(chat.EndpointError, match="no such model"),
    ):
        run(server, pairs, tmp_path / "out")
    with pytest.raises(chat.EndpointError, match="nobody answers"):
        run(server, pairs, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_an_endpoint_that_fails_again_and_again_ends_the_run(tmp_path, monkeypatch):
    pairs = make_pairs(tmp_path / "pairs", 9, {"liver": SHAPES["liver"]})
    monkeypatch.setattr(llm, "GIVE_UP", 5)
    with (
        serve(lambda handler, messages, number: handler.reply(b"", 502)) as server,
        pytest.raises(chat.EndpointError, match="5 images in a row"),
    ):
        run(server, pairs, tmp_path / "out")


def test_the_command_says_within_seconds_that_nobody_answers(tmp_path, monkeypatch, capsys):
    with serve() as server:
        pass
    pairs = make_pairs(tmp_path / "pairs", 1)
    monkeypatch.setattr(write_qa, "read_all", lambda *_: pytest.fail("the masks were read first"))
    command = ["write_qa", "--pairs", pairs, "--out", str(tmp_path / "out"), "--writer", "llm"]
    monkeypatch.setattr(sys, "argv", [*command, "--endpoint", server.url, "--model", "m"])
    assert write_qa.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{server.url}/models: nobody answers")


def test_a_killed_run_continues_and_pays_for_what_was_under_way_alone(tmp_path):
    pairs, out = make_pairs(tmp_path / "pairs", 9), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "medplib_jax.datasets.write_qa",
        "--pairs",
        pairs,
        "--out",
        str(out),
        "--writer",
        "llm",
        "--model",
        "m",
    ]
    command += ["--concurrency", "2", "--test-share", "0.5", "--endpoint"]
    delivered, process = [], None

    def kill_after_seven(handler, messages, number):
        if len(delivered) == 7:  # what these two threads have under way is lost
            process.send_signal(signal.SIGKILL)
            return handler.stall()
        delivered.append(json.dumps(messages))
        return sensible(messages)

    with serve(kill_after_seven) as server:
        process = subprocess.Popen(
            [*command, server.url], cwd=ROOT, env={**os.environ, "OPENAI_API_KEY": "secret"}, stderr=subprocess.DEVNULL
        )
        assert process.wait() == -signal.SIGKILL
        assert server.requests[0][1]["Authorization"] == "Bearer secret"
    assert not (out / "manifest.json").exists()
    kept = len(list((out / "answers").rglob("*.json")))
    assert kept >= len(delivered) - 2
    with serve() as server:
        run(server, pairs, out)
        run(server, pairs, tmp_path / "whole")
    asked = [json.dumps(body["messages"]) for body, _ in server.requests]
    assert len(set(asked[: 18 - kept]) & set(delivered)) == len(delivered) - kept and len(asked) == 18 - kept + 18
    assert files(out) == files(tmp_path / "whole")


def test_the_command_needs_an_endpoint_and_a_model(tmp_path, pairs, monkeypatch, capsys):
    arguments = ["write_qa", "--pairs", pairs, "--out", str(tmp_path / "out"), "--writer", "llm"]
    for more, message in (
        ([], "endpoint: expected an address"),
        (["--endpoint", "http://localhost:1/v1"], "model: expected"),
    ):
        monkeypatch.setattr(sys, "argv", arguments + more)
        assert write_qa.main() == 1
        assert message in capsys.readouterr().err


def test_the_model_is_told_what_masks_prove_and_no_names_of_files_or_patients(facts):
    known = {"patient": "Jane", "spacing": "[0.7, 0.7]", "region scanned": "abdomen"}
    facts = dataclasses.replace(facts, metadata=known)
    request = json.dumps(llm_prompts.description_request(facts, facts.targets))
    assert "region scanned: abdomen" in request and "Jane" not in request and "0.7" not in request
    assert (
        "Modality: CT" in request
        and "left kidney: in the lower right of the image" in request
        and "2 separate parts" in request
    )
    assert "The left kidney is to the right of and below the liver" in request
    assert "case_0" not in request and "masks/" not in request and "--" not in request


GOOD = questions(NAMES)


def changed(kind, **changes):
    return {"vqa": [], "region": [], "grounding": [], "captions": [], kind: [{**GOOD[kind][0], **changes}]}


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (changed("vqa", question=""), "question is not a text"),
        (changed("vqa", question=["Is it?"]), "question is not a text"),
        (changed("vqa", answer=None), "answer is not a text"),
        (changed("vqa", answer="Maybe"), "none of the choices"),
        (changed("vqa", choices=["Yes"]), "not different"),
        (changed("vqa", choices=["Yes", "yes."]), "not different"),
        (changed("vqa", choices={"a": "Yes"}), "not a list of up to six"),
        (changed("vqa", question="x" * 3000), "longer than 2000"),
        (changed("vqa", question="What does the description say?"), "speaks of 'description'"),
        (changed("vqa", question="Is <sr>a.png</sr> here?"), "holds the tag"),
        (changed("vqa", question="Is <image> here?"), "holds the tag"),
        (changed("vqa", question="What is the liver?", answer="The liver", choices=[]), "contains its answer"),
        (changed("vqa", question="Half \ud800?"), "not Unicode"),
        (changed("region", name="spleen"), "'spleen' is none of the structures"),
        (changed("region", name=3), "3 is none of the structures"),
        (changed("region", question="What is it?"), "does not hold <region> once"),
        (changed("region", question="Is <region> or <region>?"), "does not hold <region> once"),
        (changed("region", question="Is <region>../a.png</region>?"), "does not hold <region> once"),
        (
            changed("region", question="Which part of the liver is <region>?", answer="The upper one"),
            "names the structure",
        ),
        (
            changed("region", answer="The liver, in the lower right part of the image."),
            "the liver is not in the lower right part of the image",
        ),
        (changed("region", question="What does this mask <region> show?"), "speaks of 'mask'"),
        (changed("grounding", names=[]), "names are not a list"),
        (changed("grounding", names="liver"), "names are not a list"),
        (changed("grounding", names=["spleen"]), "none of the structures"),
        (changed("grounding", answer="The liver is here."), "does not hold one <SEG>"),
        (changed("grounding", answer="The liver is <SEG><SEG>."), "does not hold one <SEG>"),
        (changed("grounding", answer="The cyst is <SEG>."), "<SEG> does not follow the name 'liver'"),
        (changed("grounding", question="Where is <SEG>?"), "holds the tag"),
        (changed("captions", name="liver"), "no usable question"),
        ({"vqa": "What?"}, "not an object"),
        ({"vqa": [["What?", "That."]]}, "not an object"),
        ({}, "all lists are empty"),
        ([], "not one JSON object"),
    ],
)
def test_an_answer_of_another_form_is_refused_with_a_reason(facts, answer, complaint):
    with pytest.raises(llm_answers.BadAnswer, match=complaint):
        llm_answers.parse_questions(json.dumps(answer), facts, facts.targets, facts.generator(0, "test"))


@pytest.mark.parametrize(
    "text", ["", "no", "{", '{"vqa": ', "{} or {}", "[" * 100_000, '{"a": ' * 100_000, "null", '"{}"']
)
def test_what_is_no_json_object_is_refused(facts, text):
    with pytest.raises(llm_answers.BadAnswer, match="not one JSON object|all lists are empty"):
        llm_answers.parse_questions(text, facts, facts.targets, facts.generator(0, "test"))


@pytest.mark.parametrize(
    "around", ["%s", "```json\n%s\n```", "<think>Perhaps {this}?</think> Here it is: %s Good luck!"]
)
def test_an_object_may_stand_between_words(facts, around):
    assert (
        llm_answers.parse_description(around.replace("%s", json.dumps(describe(["liver"]))), facts.targets)
        == "A CT image shows <ref>the liver</ref>."
    )


def test_good_questions_are_kept_beside_bad_ones(facts):
    answer = {
        **GOOD,
        "vqa": [*GOOD["vqa"], {"question": "What does the mask show?", "answer": "A liver", "choices": []}, 7],
    }
    found = llm_answers.parse_questions(json.dumps(answer), facts, facts.targets, facts.generator(0, "test"))
    assert len(found.turns) == 8 and set(found.captions) == set(NAMES)
    assert [what for what, _ in found.problems] == ["vqa item is not an object", "vqa question cannot be used"]


def test_captions_that_contradict_the_mask_are_left_out(facts):
    said = {"liver": "The liver lies in the right half of the image.", "cyst": "Cysts on the right side of the image."}
    captions = [{"name": name, "caption": caption} for name, caption in said.items()]
    found = llm_answers.parse_questions(
        json.dumps({**GOOD, "captions": captions}), facts, facts.targets, facts.generator(0, "test")
    )
    assert list(found.captions) == ["cyst"] and [what for what, _ in found.problems] == ["caption cannot be used"]


def test_a_mask_may_be_asked_for(facts):
    answer = changed("grounding", question="Give a segmentation mask of the liver.")
    assert (
        len(llm_answers.parse_questions(json.dumps(answer), facts, facts.targets, facts.generator(0, "test")).turns)
        == 1
    )


def test_two_masks_in_one_answer(facts):
    pair = {"names": ["liver", "cyst"], "question": "Outline both.", "answer": "The liver <SEG> and the cyst <SEG>."}
    (turn,) = llm_answers.parse_questions(
        json.dumps({"grounding": [pair]}), facts, facts.targets, facts.generator(0, "test")
    ).turns
    merged = {target.name: target.merged for target in facts.targets}
    assert (
        turn.kind == "grounding_pairs"
        and turn.answer
        == f"The liver <SEG><mask>{merged['liver']}</mask> and the cyst <SEG><mask>{merged['cyst']}</mask>."
    )


@pytest.mark.parametrize(
    ("description", "complaint"),
    [
        ("A CT of <ref>the liver</ref>.", None),
        ("A CT of <ref>a large left kidney</ref>.", None),
        ("A CT of <ref>the spleen</ref>.", "none of the stated structures"),
        ("A CT of <ref>the kidney</ref>.", "none of the stated structures"),
        ("A CT of the liver.", "no structure is marked"),
        ("A CT of <ref>the liver.", "no tags but"),
        ("A CT of <ref>the liver</ref><box>(1,2),(3,4)</box>.", "no tags but"),
        ("A CT of <ref>the <b>liver</b></ref>.", "no tags but"),
        (["A CT"], "not a text"),
        (None, "not a text"),
    ],
)
def test_descriptions_mark_known_structures(facts, description, complaint):
    text = json.dumps({"description": description})
    if complaint is None:
        assert llm_answers.parse_description(text, facts.targets) == description
    else:
        with pytest.raises(llm_answers.BadAnswer, match=complaint):
            llm_answers.parse_description(text, facts.targets)


def test_the_longest_name_in_a_phrase_is_meant(tmp_path):
    pairs = make_pairs(tmp_path / "pairs", 1, {"kidney": (2, 2, 8, 8), "left_kidney": (12, 12, 18, 18)})
    one, _ = read_facts(scan(pairs)[0][0], Folder(str(tmp_path / "out"), "test"))
    assert (
        llm_answers.meant("the left kidney", one.targets).name == "left kidney"
        and llm_answers.meant("Kidneys", one.targets) is None
    )
    assert parse_boxes(llm_answers.with_boxes("<ref>the kidney</ref>", one)).tolist() == [[62, 83, 250, 333]]


def test_requests_name_their_structures():
    assert names_of(llm_prompts.questions_request("Text.", ())) == []
