"""The index of pictures: exact search, growth, resumption byte for byte, and what is refused by name."""

import argparse
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from medplib_jax import predict
from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import MASK
from medplib_jax.data.sources import open_source
from medplib_jax.datasets import index as indexing
from medplib_jax.datasets.image_index import Entry, ImageIndex, IndexWriter, nearest
from medplib_jax.datasets.index import build, library_of_pairs, library_of_records
from medplib_jax.datasets.patients import anonymous
from medplib_jax.datasets.retrieve import retrieve
from tests.paths import GOLDEN

FOLDER = GOLDEN / "icl"
RAG = np.load(FOLDER / "rag.npz")
SIDE, WIDTH = 12, 5


class FakeEmbedder:
    """Unit vectors that depend on a picture alone, in place of a checkpoint's CLIP."""

    side, width, digest = SIDE, WIDTH, "weights"

    def __init__(self, checkpoint_dir: str):
        self.calls = 0

    def __call__(self, pixels):
        self.calls += len(pixels)
        flat = pixels.reshape(len(pixels), -1).astype(np.float64)
        vectors = np.stack([np.cos(flat * (i + 1)).sum(1) for i in range(WIDTH)], axis=1)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def read(self, file):
        return images.cropped(images.load_pixels(file), SIDE)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(indexing, "Embedder", FakeEmbedder)
    monkeypatch.setattr("medplib_jax.datasets.retrieve.Embedder", FakeEmbedder)
    monkeypatch.setattr("medplib_jax.datasets.embedding.Embedder", FakeEmbedder)


def add_picture(root, name, seed, masks=("liver",)):
    rng = np.random.default_rng(seed)
    for file, pixels in [(root / "images" / f"{name}.png", rng.integers(0, 255, (20, 24)))] + [
        (root / "masks" / name / f"{mask}.png", np.full((20, 24), 255)) for mask in masks
    ]:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(pixels)).save(file)


@pytest.fixture
def pairs(tmp_path):
    root = tmp_path / "pairs"
    for number in range(11):
        add_picture(root, f"p{number:02d}", number, ("liver", "spleen") if number % 2 else ("liver",))
    return root


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def make(pairs, out, **options):
    return build(library_of_pairs(str(pairs)), str(out), "checkpoint", batch=4, **options)


def test_pixels_are_cropped_as_the_originals():
    expected = np.load(FOLDER / "rag_pixels.npz")["pixels_u8"]
    for name, pixels in zip("abcd", expected, strict=True):
        np.testing.assert_array_equal(images.cropped(images.load_pixels(str(FOLDER / f"{name}.png")), 336), pixels)


def test_the_originals_vectors_find_what_the_original_finds():
    scores, rows = nearest(RAG["embeddings"], RAG["embeddings"], 3)
    assert rows.tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 0, 1]]
    np.testing.assert_allclose(scores, -np.sort(-RAG["scores"], axis=1)[:, :3], atol=1e-6)


def test_the_originals_augmentation_is_found_again():
    """17 candidates, several of each picture: what is chosen has the best scores, and equal ones go by their order."""
    recorded = json.loads((FOLDER / "rag_augment.json").read_text())
    place = {f"{name}.png": row for row, name in enumerate("abcd")}
    vectors = RAG["embeddings"][[place[one["image"]] for one in recorded["candidates"]]]
    queries = RAG["embeddings"][[place[one["image"]] for one in recorded["augmented"]]]
    scores, rows = nearest(vectors, queries, recorded["top_k"])
    expected = np.array(recorded["scores"])
    np.testing.assert_allclose(queries @ vectors.T, expected, atol=1e-5)
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :3], atol=1e-5)
    for chosen, one in zip(rows, recorded["augmented"], strict=True):
        found = [recorded["candidates"][row] for row in chosen]
        assert found == one["icl_examples"] and list(chosen) == sorted(chosen)


def test_the_originals_candidates_are_the_pairs_of_our_records():
    """Of a numbered record the original does not tell the target: it takes the pair for one more candidate."""
    recorded = json.loads((FOLDER / "rag_candidates.json").read_text())
    files = ("items.json", "rag_items.json")
    records = [one for file in files for one in open_source(str(FOLDER / file), str(FOLDER))]
    assert [record.images[-1] for record in records] == recorded["extract_query_image"]
    pairs, targets = [], []
    for record in records:
        drawn = MASK.findall(record.turns[-1][1])
        pairs += [(record.images[-1], mask) for mask in drawn] + [*(record.examples or ())]
        targets += drawn or [None]
    assert sorted(pairs) == sorted((one["image"], one["mask"]) for one in recorded["collect_candidates"])
    assert targets[1] == "d_mask.png" and recorded["extract_target_mask"][1] is None
    assert targets[:1] + targets[2:] == recorded["extract_target_mask"][:1] + recorded["extract_target_mask"][2:]


@pytest.mark.parametrize(("count", "k"), [(1, 3), (40, 3), (70_000, 5)])
def test_search_equals_brute_force(count, k):
    rng = np.random.default_rng(0)
    vectors, queries = rng.standard_normal((count, 8), np.float32), rng.standard_normal((6, 8), np.float32)
    allowed = rng.random(count) < 0.7
    allowed[0] = True
    scores, rows = nearest(vectors, queries, k, allowed)
    products = np.where(allowed, queries.astype(np.float64) @ vectors.T, -np.inf)
    best = np.argsort(-products, axis=1, kind="stable")[:, :k]
    found = np.isfinite(scores)
    assert found.sum(1).tolist() == [min(k, int(allowed.sum()))] * 6
    np.testing.assert_array_equal(rows[:, : best.shape[1]][found[:, : best.shape[1]]], best[found[:, : best.shape[1]]])


def test_equal_vectors_go_by_their_order():
    scores, rows = nearest(np.ones((33_000, 2), np.float32), np.ones((1, 2), np.float32), 3)
    assert rows.tolist() == [[0, 1, 2]] and scores.tolist() == [[2.0, 2.0, 2.0]]


def test_a_killed_build_ends_in_the_same_bytes(pairs, tmp_path, monkeypatch):
    make(pairs, tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    for kill_after in (0, 1, 2):
        out, added = tmp_path / f"killed{kill_after}", IndexWriter.add

        def add(self, vectors, entries, out=out, added=added, kill_after=kill_after):
            if len(self.entries) == 4 * kill_after:  # in the middle of a batch, the two files at different rows
                with open(out / "vectors.f32", "ab") as file:
                    file.write(vectors.tobytes()[:-7])
                with open(out / "entries.jsonl", "ab") as file:
                    file.write(b'{"image": "half')
                raise KeyboardInterrupt
            added(self, vectors, entries)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(IndexWriter, "add", add)
            make(pairs, out)
        with pytest.raises(DataError, match="index is not complete; expected its build run to the end"):
            ImageIndex(str(out))
        assert make(pairs, out)["embedded_now"] == 11 - 4 * kill_after
        assert files_of(out) == whole


def test_pictures_that_come_later_do_not_move_the_others(pairs, tmp_path):
    make(pairs, tmp_path / "index")
    before = files_of(tmp_path / "index")
    add_picture(pairs, "a_new_one", 50)
    found = make(pairs, tmp_path / "index")
    assert (found["pictures"], found["embedded_now"]) == (12, 1)
    after = files_of(tmp_path / "index")
    for name in ("vectors.f32", "entries.jsonl"):
        assert after[name].startswith(before[name]) and len(after[name]) > len(before[name])
    assert make(pairs, tmp_path / "index")["embedded_now"] == 0 and files_of(tmp_path / "index") == after | {
        "index.json": files_of(tmp_path / "index")["index.json"]
    }


def test_search_keeps_to_structures_patients_and_other_pictures(pairs, tmp_path):
    make(pairs, tmp_path / "index")
    index = ImageIndex(str(tmp_path / "index"))
    assert index.names == ("liver", "spleen")
    query = index.vectors[3:4]
    own = str(pairs / "images" / "p03.png")
    best = index.search(query, 3)[0]
    assert os.path.samefile(best[0].image, own) and best[0].score == pytest.approx(1, abs=1e-6)
    assert all("spleen" in hit.masks for hit in index.search(query, 8, "spleen")[0])
    assert len(index.search(query, 8, "spleen")[0]) == 5
    without = index.search(query, 3, patients=[anonymous("p03")])[0]
    assert [hit.image for hit in without[:2]] == [hit.image for hit in best[1:]]
    copy = tmp_path / "copy.png"
    shutil.copy(own, copy)
    assert [hit.image for hit in index.search(query, 3, pictures=[str(copy)])[0]] == [hit.image for hit in without]


def test_a_picture_of_the_index_finds_no_other_of_its_patient(pairs, tmp_path):
    build(library_of_pairs(str(pairs), r"p(\d)"), str(tmp_path / "index"), "checkpoint", batch=4)
    index, picture = ImageIndex(str(tmp_path / "index")), str(pairs / "images" / "p03.png")
    found = index.search(index.vectors[3:4], 20, pictures=[picture])[0]
    assert [os.path.basename(hit.image) for hit in found] == ["p10.png"]  # p00 to p09 are one patient here


def test_predict_says_that_no_example_is_left(tmp_path, monkeypatch):
    add_picture(tmp_path / "pairs", "p0", 0, ("liver", "kidney"))
    add_picture(tmp_path / "pairs", "p1", 1)
    make(tmp_path / "pairs", tmp_path / "index")
    image = str(tmp_path / "pairs/images/p0.png")
    asked = argparse.Namespace(
        examples=str(tmp_path / "index"), checkpoint="run", image=image, structure="liver", top_k=3
    )
    assert [os.path.basename(found) for found, _ in predict.retrieved(asked)] == ["p1.png"]
    asked.structure = "kidney"
    with pytest.raises(
        DataError, match="no other patient's picture with a mask of kidney; expected at least one, found none"
    ):
        predict.retrieved(asked)


def test_what_does_not_belong_to_an_index_is_named(pairs, tmp_path):
    out = tmp_path / "index"
    make(pairs, out)
    with pytest.raises(DataError, match="index of another checkpoint's CLIP; expected weights weights, .*found other"):
        ImageIndex(str(out)).check_weights("other")
    with pytest.raises(DataError, match="index has another clip; expected other, found weights"):
        IndexWriter(str(out), "other", WIDTH, 4, str(pairs))
    with pytest.raises(DataError, match="index has another batch; expected 8, found 4"):
        build(library_of_pairs(str(pairs)), str(out), "checkpoint", batch=8)
    with pytest.raises(DataError, match="folder holds other files"):
        build(library_of_pairs(str(pairs)), str(pairs), "checkpoint")
    with pytest.raises(DataError, match="not an index of pictures"):
        ImageIndex(str(pairs))
    add_picture(pairs, "p04", 99)
    with pytest.raises(DataError, match="picture has changed since it was indexed"):
        make(pairs, out)


def test_a_picture_that_has_other_masks_or_another_patient_is_refused(pairs, tmp_path):
    """What the index says of a picture is never kept in silence when it is no longer so."""
    make(pairs, tmp_path / "index")
    before = files_of(tmp_path / "index")
    with pytest.raises(DataError, match="p00.png: picture has another patient since it was indexed"):
        build(library_of_pairs(str(pairs), r"(p)"), str(tmp_path / "index"), "checkpoint", batch=4)
    shutil.copy(pairs / "masks/p00/liver.png", pairs / "masks/p00/kidney.png")
    with pytest.raises(DataError, match="p00.png: picture has other masks since it was indexed"):
        make(pairs, tmp_path / "index")
    assert files_of(tmp_path / "index") == before  # and can be searched still


def test_an_index_of_another_version_is_refused(pairs, tmp_path):
    make(pairs, tmp_path / "index")
    head = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps(head | {"version": 0}))
    with pytest.raises(DataError, match="index of another version; expected 1, found 0"):
        ImageIndex(str(tmp_path / "index"))


def test_the_option_patient_is_refused_for_records(monkeypatch, capsys):
    command = ["index", "--records", "icl.json", "--patient", "(p)", "--out", "index", "--checkpoint", "run"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        indexing.main()
    assert "--patient: expected with --images, records name their patients" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_named_and_never_found(pairs, tmp_path):
    (pairs / "images" / "p05.png").write_bytes(b"no picture")
    found = make(pairs, tmp_path / "index")
    assert found["unreadable"] == 1 and any("p05.png" in notice for notice in found["notices"])
    hits = ImageIndex(str(tmp_path / "index")).search(np.ones((1, WIDTH), np.float32), 11)[0]
    assert len(hits) == 10 and not any("p05" in hit.image for hit in hits)


def test_several_masks_of_a_name_are_left_out_by_name(pairs):
    shutil.copy(pairs / "masks/p00/liver.png", pairs / "masks/p00/liver_001.png")
    library = library_of_pairs(str(pairs))
    assert dict((image, masks) for image, masks, _ in library.pictures)["images/p00.png"] == {}
    assert any("p00.png: liver is left out" in notice for notice in library.notices)


@pytest.fixture
def records(tmp_path):
    """One record of each of five patients, and another picture of the first."""
    root = tmp_path / "icl"
    raw = []
    for number, patient in enumerate("abcdea"):
        name = f"p{number}"
        add_picture(root, name, number)
        target = {"image": f"images/{name}.png", "target_mask": f"masks/{name}/liver.png"}
        other = {"image": f"images/p{(number + 1) % 5}.png", "mask": f"masks/p{(number + 1) % 5}/liver.png"}
        raw.append(target | {"icl_examples": [other], "structure": "liver", "patient": patient})
    (root / "test").mkdir()
    (root / "test" / "icl.json").write_text(json.dumps(raw))
    return root


def test_records_get_examples_of_other_patients(records, tmp_path):
    file, out = records / "test" / "icl.json", records / "test" / "retrieved.json"
    build(library_of_records(str(file)), str(tmp_path / "index"), "checkpoint", batch=4)
    made = retrieve(str(file), str(tmp_path / "index"), "checkpoint", str(out))
    assert made == {"records": 6, "left_out": 0, "notices": []}
    raw, index = json.loads(out.read_text()), ImageIndex(str(tmp_path / "index"))
    for number, record in enumerate(raw):
        names = [int(one["image"][8]) for one in record["icl_examples"]]
        assert len(names) == 3 and "abcdea"[number] not in {"abcdea"[name] for name in names}
        scores = index.vectors @ index.vectors[number]
        others = [row for row in np.argsort(-scores, kind="stable") if "abcdea"[row] != "abcdea"[number]]
        assert names == others[:3]


def test_records_that_do_not_tell_their_structure_are_named(records, tmp_path):
    file = records / "test" / "icl.json"
    raw = json.loads(file.read_text())
    del raw[2]["structure"]
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="record 2: record does not tell its structure"):
        library_of_records(str(file))


def changed(records, **changes):
    """The annotation file with these fields of its last record, whose picture is then that of record 0."""
    file = records / "test" / "icl.json"
    raw = json.loads(file.read_text())
    raw[-1] |= {"image": "images/p0.png"} | changes
    file.write_text(json.dumps(raw))
    return str(file)


def test_two_masks_of_a_structure_in_records_are_left_out_by_name(records):
    library = library_of_records(changed(records))  # masks/p5/liver.png beside masks/p0/liver.png
    assert dict((image, masks) for image, masks, _ in library.pictures)["images/p0.png"] == {}
    assert library.notices == ("images/p0.png: liver is left out; expected one mask of each name",)


def test_records_of_one_picture_agree_about_the_patient(records):
    known = library_of_records(changed(records, patient=""))
    assert dict((image, patient) for image, _, patient in known.pictures)["images/p0.png"] == "a"
    with pytest.raises(DataError, match="record 5: picture is of another patient in an earlier record; expected a, fo"):
        library_of_records(changed(records, patient="z"))


def test_records_do_not_lead_out_of_their_folder(records, tmp_path):
    shutil.copy(records / "images/p0.png", tmp_path / "secret.png")
    with pytest.raises(DataError, match="record 5: path leaves the data folder"):
        library_of_records(changed(records, image="../secret.png"))


def test_unknown_patients_are_said(records, tmp_path):
    """Where a record or an indexed picture does not tell its patient, only the same picture is excluded."""
    file, index = changed(records, image="images/p5.png", patient=""), str(tmp_path / "index")
    build(library_of_records(file), index, "checkpoint", batch=4)
    made = retrieve(file, index, "checkpoint", str(records / "test" / "retrieved.json"))
    assert made["notices"] == [
        f"{file}: 1 of 6 records do not tell their patient, whose other pictures may be among the examples",
        f"{index}: 1 of 6 pictures do not tell their patient, who may be that of the record",
    ]


def test_an_entry_survives_its_file(tmp_path):
    writer = IndexWriter(str(tmp_path / "index"), "weights", WIDTH, 2, str(tmp_path))
    entry = Entry("images/a.png", {"liver": "masks/a.png"}, "patient", (1, 2))
    writer.add(np.ones((1, WIDTH), np.float32), [entry])
    writer.finish()
    assert ImageIndex(str(tmp_path / "index")).entries == [entry]
