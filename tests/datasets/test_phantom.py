"""The generated dataset: on-disk form, truthfulness of answers against masks, balance, determinism."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medplib_jax.datasets.phantom import draw as phantom_draw
from medplib_jax.datasets.phantom import generate as phantom
from medplib_jax.datasets.phantom import grit


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(folder, split, kind):
    return json.loads((folder / phantom.FILES[split][kind]).read_text())


def in_file(path):
    """The conversations of a file in Med-GRIT's form."""
    return [record["conversations"] for record in json.loads(path.read_text())]


def turns(records):
    for record in records:
        messages = record["conversations"]
        assert [message["from"] for message in messages] == ["human", "gpt"] * (len(messages) // 2)
        assert messages[0]["value"].startswith("<image>\n")
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            yield record, question["value"].removeprefix("<image>\n"), answer["value"]


def visible_names(folder, record):
    stem = record["image"].removeprefix("images/").removesuffix(".png")
    return {
        path.stem.removeprefix(stem + "--").replace("_", " ")
        for path in (folder / "masks_merged").glob(stem + "--*.png")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    manifest = phantom.generate(folder, 160, 48, seed=3, processes=1)
    return folder, manifest


def test_same_arguments_same_bytes_and_prefix(tmp_path):
    small, again, parallel = tmp_path / "small", tmp_path / "again", tmp_path / "parallel"
    phantom.generate(small, 10, 4, seed=1, processes=1)
    phantom.generate(again, 10, 4, seed=1, processes=1)
    phantom.generate(parallel, 64, 4, seed=1, processes=2)
    assert digest(small) == digest(again)
    images = {name: value for name, value in digest(small).items() if name.endswith(".png")}
    assert images.items() <= digest(parallel).items()
    other = tmp_path / "other"
    phantom.generate(other, 10, 4, seed=2, processes=1)
    assert not set(images.values()) & {value for name, value in digest(other).items() if name.startswith("images/")}


def test_complete_folder_is_left_alone_and_interrupted_one_is_redone(tmp_path):
    first = phantom.generate(tmp_path, 8, 2, seed=0)
    complete = digest(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert phantom.generate(tmp_path, 8, 2, seed=0) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    with pytest.raises(ValueError, match="manifest.json.*expected"):
        phantom.generate(tmp_path, 9, 2, seed=0)
    (tmp_path / "manifest.json").unlink()
    next((tmp_path / "images").iterdir()).unlink()
    phantom.generate(tmp_path, 8, 2, seed=0)
    assert digest(tmp_path) == complete


def test_wrong_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1, found 0 and 1"):
        phantom.generate(tmp_path, 0, 1)


def test_some_modalities_alone_are_drawn_by_turns(tmp_path):
    manifest = phantom.generate(tmp_path / "two", 4, 2, processes=1, modalities=("mr", "ct"))
    names = sorted(path.name.partition("_")[0] for path in (tmp_path / "two" / "images").iterdir())
    assert names == ["ct"] * 3 + ["mr"] * 3 and manifest["modalities"] == ["ct", "mr"]
    with pytest.raises(ValueError, match="holds a phantom of .*'modalities'"):
        phantom.generate(tmp_path / "two", 4, 2, processes=1)
    with pytest.raises(ValueError, match="modalities .'mri'. are not among"):
        phantom.generate(tmp_path / "other", 4, 2, processes=1, modalities=("mri",))


def test_every_path_exists_and_masks_fit(made):
    folder, manifest = made
    for split, files in phantom.FILES.items():
        for kind, name in files.items():
            records = read(folder, split, kind)
            assert len(records) == manifest["records"][name] > 0
            for record, question, answer in turns(records):
                assert f"--{split}_" in record["image"]
                size = Image.open(folder / record["image"]).size
                for path in re.findall(r"<(?:mask|region)>(.*?)</", question + answer):
                    mask = Image.open(folder / path)
                    assert mask.mode == "L" and mask.size == size
                    assert set(np.unique(mask)) == {0, 255}
                assert answer.count("<SEG>") == answer.count("<mask>") <= 2


def test_test_records_are_single_turn_and_images_disjoint(made):
    folder, _ = made
    train = {record["image"] for kind in phantom.FILES["train"] for record in read(folder, "train", kind)}
    for kind in phantom.FILES["test"]:
        for record in read(folder, "test", kind):
            assert len(record["conversations"]) == 2 and record["answer_type"] in ("open", "closed")
            assert record["image"] not in train
            if record["answer_type"] == "closed":
                assert re.fullmatch(r"Yes|No|.* present|.* absent|normal|abnormal", record["conversations"][1]["value"])


def test_answers_agree_with_the_masks(made):
    folder, _ = made
    findings = {finding.name for modality in phantom_draw.MODALITIES for finding in modality.findings}
    labels = {modality.prefix: modality.label for modality in phantom_draw.MODALITIES}
    asked = Counter()
    for record, question, answer in turns(read(folder, "train", "complex") + read(folder, "test", "complex")):
        names = visible_names(folder, record)
        label = labels[record["image"].removeprefix("images/").split("_00--")[0]]
        if match := re.fullmatch(
            r"Is (?:the|there an?) (.*?) (?:visible )?in this image\?|Please look for the (.*)\.", question
        ):
            kind, expected = (
                "presence",
                f"{match[1] or match[2]} {'present' if (match[1] or match[2]) in names else 'absent'}",
            )
        elif match := re.fullmatch(r"Is this an? (.*) image\?", question):
            kind, expected = "modality?", "Yes" if match[1] == label else "No"
        elif question.startswith("What"):
            kind, expected = "modality", label
        elif match := re.fullmatch(r"How many (.*)s are there\?", question):
            stem = record["image"].removeprefix("images/").removesuffix(".png")
            kind, expected = "count", str(len(list((folder / "masks").glob(f"{stem}--{match[1]}_*.png"))))
        elif match := re.fullmatch(r"On which side of the image is the (.*)\?", question):
            mask = np.asarray(
                Image.open(
                    folder
                    / record["image"]
                    .replace("images/", "masks_merged/")
                    .replace(".png", f"--{match[1].replace(' ', '_')}.png")
                )
            )
            kind, expected = "side", "left" if np.nonzero(mask)[1].mean() + 0.5 < mask.shape[1] / 2 else "right"
        else:
            assert question == "Is this image normal or abnormal?"
            kind, expected = "normality", "abnormal" if names & findings else "normal"
        assert answer == expected, (record["image"], question)
        asked[kind] += 1
    assert set(asked) == {"presence", "modality?", "modality", "count", "side", "normality"}


def test_grounding_answers_name_what_is_there(made):
    folder, _ = made
    masks = Counter()
    for record, question, answer in turns(read(folder, "train", "grounding") + read(folder, "test", "grounding")):
        names = visible_names(folder, record)
        for path in re.findall(r"<mask>(.*?)</mask>", answer):
            name = path.removesuffix(".png").split("--")[-1].replace("_", " ")
            assert name in names and f"{name} <SEG>" in answer and name in question
        if "<SEG>" not in answer:
            absent = re.fullmatch("(.*) absent", answer)[1]
            assert absent not in names and absent in question
        masks[answer.count("<SEG>")] += 1
    share = masks[0] / masks.total()
    assert 0.2 < share < 0.5 and masks[2] > 0.05 * masks.total(), masks


def test_region_answers_match_their_masks(made):
    folder, _ = made
    findings = {finding.name for modality in phantom_draw.MODALITIES for finding in modality.findings}
    for _, question, answer in turns(read(folder, "train", "region") + read(folder, "test", "region")):
        (path,) = re.findall(r"<region>(.*?)</region>", question)
        name = re.fullmatch(r"masks/.*--(.*)_\d{3}\.png", path)[1].replace("_", " ")
        assert answer == (
            ("abnormal" if name in findings else "normal") if question.endswith("normal or abnormal?") else name
        )


def test_no_name_is_asked_about_twice_in_a_conversation(made):
    folder, _ = made
    names = {thing.name for modality in phantom_draw.MODALITIES for thing in (*modality.structures, *modality.findings)}
    for kind in ("complex", "grounding"):
        for record in read(folder, "train", kind):
            questions = " ".join(message["value"] for message in record["conversations"][::2])
            counts = {name: len(re.findall(rf"\b{name}s?\b", questions)) for name in names}
            assert max(counts.values()) <= 1, record


def test_closed_questions_are_balanced(made):
    folder, _ = made
    records = read(folder, "train", "complex")
    answers = Counter(answer.split()[-1] for _, _, answer in turns(records))
    assert 0.35 < answers["Yes"] / (answers["Yes"] + answers["No"]) < 0.65
    assert 0.42 < answers["present"] / (answers["present"] + answers["absent"]) < 0.58
    regions = Counter(answer for _, _, answer in turns(read(folder, "train", "region")))
    assert 0.35 < regions["normal"] / (regions["normal"] + regions["abnormal"]) < 0.65


def test_reports_name_everything_of_the_modality(made):
    folder, _ = made
    names = {
        modality.label: {thing.name for thing in modality.structures + modality.findings}
        for modality in phantom_draw.MODALITIES
    }
    for record, _, answer in turns(read(folder, "train", "align")):
        modality, statements = answer.split(": ")
        found = dict(statement.rsplit(" ", 1) for statement in statements.split(", "))
        assert set(found) == names[modality]
        assert {name for name, state in found.items() if state == "present"} == set(visible_names(folder, record))


@settings(max_examples=24)
@given(modality=st.sampled_from(phantom_draw.MODALITIES), seed=st.integers(0, 2**31))
def test_scenes_are_well_formed(modality, seed):
    scene = phantom_draw.draw_scene(modality, np.random.default_rng(seed))
    height, width = scene.image.shape[:2]
    assert (
        scene.image.dtype == np.uint8
        and 96 <= max(height, width) <= 160
        and max(height, width) <= 1.65 * min(height, width)
    )
    covered = np.sum([instance.mask for instance in scene.instances], axis=0)
    assert covered.max() == 1  # visible pixels belong to one instance
    structures = {instance.name for instance in scene.instances if not instance.finding}
    findings = [instance for instance in scene.instances if instance.finding]
    assert 2 <= len(structures) <= 4 and len(findings) <= 2
    for instance in scene.instances:
        smallest = phantom_draw.MIN_FINDING_AREA if instance.finding else phantom_draw.MIN_STRUCTURE_AREA
        assert instance.mask.shape == (height, width) and instance.mask.mean() >= smallest


def test_modalities_look_different():
    """Mean colour and contrast alone tell most modalities apart: a nearest-mean rule over a dozen images of each."""

    def features(modality, seed):
        image = phantom_draw.draw_scene(modality, np.random.default_rng(seed)).image
        image = np.asarray(Image.fromarray(image).convert("RGB").resize((16, 16)), np.float32)
        return image.ravel()

    means = np.stack(
        [np.mean([features(modality, seed) for seed in range(6)], axis=0) for modality in phantom_draw.MODALITIES]
    )
    hits = [
        np.argmin(((means - features(modality, seed)) ** 2).sum(1)) == number
        for number, modality in enumerate(phantom_draw.MODALITIES)
        for seed in range(100, 106)
    ]
    assert np.mean(hits) > 0.9


@pytest.fixture(scope="module")
def in_grit(made):
    folder, _ = made
    grit.write_grit(folder)
    return lambda name: in_file(folder / name)


def test_no_turn_tells_what_another_of_its_conversation_asks(in_grit):
    for turns in itertools.chain.from_iterable(map(in_grit, (grit.FIND, grit.FINDINGS, grit.ROUGH, grit.LOOK))):
        asked = [part for question, _ in turns for part in re.findall("<box>.*?</box>|<ref>the .*?</ref>", question)]
        assert len(set(asked)) == len(asked)
    for turns in in_grit(grit.LOOK):
        named = [re.search(r"[Tt]he (.*)\.", answer)[1] for question, answer in turns if "<box>" in question]
        assert len(set(named)) == len(named)


def test_boxes_to_learn_from_are_those_of_the_questions_rounded_from_left_to_right(in_grit):
    alone = {answer for turns in in_grit(grit.file_of("train", "VG")) for _, answer in turns}
    starts = [[int(x) for x in re.findall(r"<box>\((\d+),", answer)] for answer in alone]
    assert any(len(one) > 1 for one in starts) and all(one == sorted(one) for one in starts)
    for name, step in ((grit.ROUGH, 100), (grit.FINDINGS, 10), (grit.FIND, 10)):
        answers = [answer for turns in in_grit(name) for _, answer in turns]
        assert set(answers) <= {grit.rounded(answer, step) for answer in alone}
    assert grit.rounded("<ref>the 2 eyes</ref><box>(157,242),(9,999)</box>", 10).endswith("(155,245),(5,995)</box>")
    assert grit.rounded("<box>(157,242),(9,999)</box>", 100) == "<box>(150,250),(50,950)</box>"


def test_findings_are_asked_of_alone_in_two_of_the_files(made, in_grit):
    """Who is asked where structures lie, too, guesses it from their names and does not look."""
    findings = {finding.name for modality in phantom_draw.MODALITIES for finding in modality.findings}
    shown = defaultdict(set)
    for record in json.loads((made[0] / grit.file_of("train", "VG")).read_text()):
        shown[record["id"]] |= findings & set(re.findall("<ref>the (.*?)</ref>", record["conversations"][0][0]))
    for name in (grit.ROUGH, grit.FINDINGS):
        records = json.loads((made[0] / name).read_text())
        assert Counter(record["id"] for record in records) == {one: grit.ROUNDS for one in shown if shown[one]}
        for record in records:
            asked = [re.search("<ref>the (.*?)</ref>", question)[1] for question, _ in record["conversations"]]
            assert sorted(asked) == sorted(shown[record["id"]])


def test_conversations_ask_of_every_name_up_to_a_number(made, in_grit):
    alone = grit.file_of("train", "VG")
    read = {name: json.loads((made[0] / name).read_text()) for name in (alone, grit.FIND, grit.LOOK)}
    names = Counter(record["id"] for record in read[alone])
    assert max(names.values()) > grit.NAMED > min(names.values())
    assert len(read[grit.FIND]) == len(read[grit.LOOK]) == grit.ROUNDS * 160
    for record in read[grit.FIND]:
        assert len(record["conversations"]) == min(names[record["id"]], grit.NAMED)
    beginnings = Counter()
    for record in read[grit.LOOK]:
        of_boxes = ["<box>" in question for question, _ in record["conversations"]]
        assert sum(of_boxes) == min(names[record["id"]], grit.NAMED) and all(of_boxes[1:])
        beginnings[of_boxes[0]] += 1
    assert 0.4 < beginnings[True] / len(read[grit.LOOK]) < 0.6  # else an answer that comes first is a box


def test_a_yes_about_the_kind_of_image_is_as_likely_as_a_no_whatever_is_asked(tmp_path):
    """Else the question tells the answer: nobody asks for a kind that is not drawn."""
    phantom.generate(tmp_path, 60, 1, processes=1, modalities=("ct", "mr"))
    grit.write_grit(tmp_path)
    answers = [turn for turns in in_file(tmp_path / grit.LOOK) for turn in turns if "Is this" in turn[0]]
    kinds = Counter((re.search("CT|MR|[^ ]+(?= image)", question)[0], answer) for question, answer in answers)
    assert {kind for kind, _ in kinds} == {"CT", "MR"}
    assert all(0.35 < kinds[kind, "Yes."] / (kinds[kind, "Yes."] + kinds[kind, "No."]) < 0.65 for kind in ("CT", "MR"))


def test_generator_needs_no_jax():
    code = "import sys, medplib_jax.datasets.phantom.generate; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "medplib_jax.datasets.phantom",
        "--out",
        str(tmp_path / "out"),
        "--examples",
        "2",
        "--test-examples",
        "1",
        "--seed",
        "5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["examples"] == 2 and (tmp_path / "out" / "manifest.json").exists()
