"""What BiRD's text must be: ids, prompts, labels and boxes beside those that the original programs computed."""

import re
from collections.abc import Iterator, Sequence

from medplib_jax.data import boxes, chatml
from medplib_jax.data.boxes import Box
from medplib_jax.data.qwen_tokenizer import IMAGE_PAD, SPECIALS, TAGS, QwenTokenizer
from medplib_jax.data.records import parse_record
from tests.convert.checks import Row

_TURN = re.compile(r"<\|im_start\|>(user|assistant)\n(.*?)<\|im_end\|>\n", re.DOTALL)


def check_text(cases: dict, tokenizer: QwenTokenizer) -> Iterator[Row]:
    """Ids, labels and prompts; none may differ."""
    expected = cases["ids"]
    yield Row("vocabulary", float(tokenizer.vocab_size != expected["model_vocab"]), 0.0)
    yield Row("vocabulary", float(tokenizer.id_of(IMAGE_PAD) + 1 != expected["tokenizer_size"]), 0.0)
    yield Row("vocabulary", float(tokenizer.eos_id != expected["n_ranks"]), 0.0)
    for special, token in expected["special"].items():
        yield Row("special ids", float(tokenizer.id_of(special) != token), 0.0)
    for case in cases["tokenize"]:
        ids = _ids_or_error(tokenizer, case["text"])
        yield Row("ids of texts", float(ids != case.get("ids")), 0.0)
        if ids is not None and "decoded" in case:
            yield Row("decoded texts", float(tokenizer.decode(ids, skip_special=False) != case["decoded"]), 0.0)
            found = without_tags(tokenizer.decode(ids))
            yield Row("decoded texts without tags", float(found != case["decoded_skip_special"]), 0.0)
    for case in cases["finetune_preprocess"].values():
        turns = [tuple(turn) for turn in case["conversation"]]
        turns = turns[1:] if turns[0][0] == "assistant" else turns
        ids, counts = as_finetune(turns, tokenizer)
        labels = [token if count else -100 for token, count in zip(ids, counts, strict=True)]
        length = case["max_len"]
        padding = max(0, length - len(ids))
        found = (ids + [tokenizer.pad_id] * padding)[:length], (labels + [-100] * padding)[:length]
        yield Row("ids of conversations", float(found[0] != case["input_ids"]), 0.0)
        yield Row("labels", float(found[1] != case["labels"]), 0.0)
        valid = [token != tokenizer.pad_id for token in found[0]]
        yield Row("which ids are no padding", float(valid != list(map(bool, case["attention_mask"]))), 0.0)
    for case in cases["make_context"].values():
        ids = as_make_context(case, tokenizer)
        yield Row("prompts", float(ids != case["context_tokens"]), 0.0)
        yield Row("texts of prompts", float(tokenizer.decode(ids, skip_special=False) != case["raw_text"]), 0.0)
    for case in cases["decode_tokens"]:
        answer = case["tokens"][case["context_length"] :]
        ends = [i for i, token in enumerate(answer) if token in tokenizer.stop_ids]
        # where no mark of ChatML ends an answer the original loses its last token, or keeps <|endoftext|>
        expected = case["chatml"] if ends and answer[ends[0]] != tokenizer.eos_id else case["raw"]
        found = tokenizer.decode(answer[: ends[0]] if ends else answer)
        yield Row("texts of answers", float(found != expected), 0.0)


def without_tags(text: str) -> str:
    """As the original decodes without special tokens: the numbers of a box stay, its tags do not."""
    return re.sub("|".join(map(re.escape, TAGS)), "", text)


def as_make_context(case: dict, tokenizer: QwenTokenizer) -> list[int]:
    """The prompt of a question behind its history, newest turns first as far as they fit. (What asks here keeps the
    whole conversation, or refuses it.)"""
    turns, kept = [("human", case["query"])], []
    system = case["system"] or ""
    for question, answer in reversed(case["history"] or []):
        pair = [("human", question), ("gpt", answer)]
        size = len(chatml.turns_to_ids([*pair, *kept], tokenizer, TAGS, system)[0])
        if size >= case["max_window_size"]:
            break
        kept = [*pair, *kept]
    ids = chatml.turns_to_ids([*kept, *turns], tokenizer, TAGS, system)[0]
    return [*ids, tokenizer.im_start_id, *tokenizer.encode("assistant\n")]


def as_finetune(turns, tokenizer: QwenTokenizer) -> tuple[list[int], list[bool]]:
    """ChatML with every special string of the contents as its id, as the original lets a user type them."""
    roles = {"user": "human", "assistant": "gpt"}
    return chatml.turns_to_ids([(roles[role], text) for role, text in turns], tokenizer, SPECIALS)


def _ids_or_error(tokenizer: QwenTokenizer, text: str) -> list[int] | None:
    try:
        return tokenizer.encode(text)
    except ValueError:
        return None


def check_boxes(cases: dict) -> Iterator[Row]:
    for case in cases["to_list_format"]:
        # the original crashes on what cannot be read, and gives a phrase to its first box only
        expected = [(tuple(box["box"]), box.get("ref", "")) for box in case.get("boxes", ())]
        found = boxes.read(case["text"])
        firsts = list(zip([box.corners for box in found], first_labels(found), strict=True))
        yield Row("boxes of texts", float(firsts != expected), 0.0)
    for case in cases["from_list_format"]:
        yield Row("texts of lists", float(as_list_format(case["list"]) != case["text"]), 0.0)
    for case in cases["draw_bbox_on_latest_picture"]:
        found, calls = boxes.read(case["response"]), []
        for box, label in zip(found, first_labels(found), strict=True):
            corners = list(box.pixels(*case["size_wh"]))
            calls += [["box", corners]] + ([["text", label, corners[:2]]] if label else [])
        yield Row("boxes in pixels", float(calls != case["calls"]), 0.0)


def first_labels(found: Sequence[Box]) -> list[str]:
    """The phrase of each box, as the original gives it to the first one only."""
    return [
        box.label if box.label not in [earlier.label for earlier in found[:i]] else "" for i, box in enumerate(found)
    ]


def as_list_format(parts: Sequence[dict]) -> str:
    """The text of pictures, words and boxes."""
    text, pictures = "", 0
    for part in parts:
        if "image" in part:
            pictures += 1
            text += f"Picture {pictures}: <img>{part['image']}</img>\n"
        text += part.get("text", "") + (f"<ref>{part['ref']}</ref>" if "ref" in part else "")
        text += "".join(str(Box(*map(int, corners))) for corners in part.get("box", ()))
    return text


def check_examples(cases: dict, tokenizer: QwenTokenizer) -> Iterator[Row]:
    """BiRD's own training ids, labels and pictures of whole conversations, and how they are packed and padded."""
    made = []
    for record, text, example in zip(cases["records"], cases["rendered"], cases["examples"], strict=True):
        turns = [
            (role, text)
            for pair in record["conversations"]
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        ids, labels = with_labels(turns, tokenizer)
        made.append((ids, labels, example.get("images") or []))
        yield Row("ids of BiRD's examples", float(ids != example["input_ids"]), 0.0)
        yield Row("labels of BiRD's examples", float(labels != example["labels"]), 0.0)
        parsed = parse_record(record, "bird.json", 0, "")
        yield Row("pictures of BiRD's examples", float(list(parsed.images) != (example.get("images") or [])), 0.0)
        system = chatml.turns_to_ids([], tokenizer)[0]
        decoded = tokenizer.decode(ids[len(system) :], skip_special=False)
        yield Row("texts of BiRD's examples", float(decoded != text), 0.0)
    yield from check_processor(cases["processor_cases"], tokenizer)
    yield from check_packs(cases, made, tokenizer)
    texts = cases["infer_batch_tokenised"]
    encoded = [tokenizer.encode(text) for text in texts["texts"]]
    width = max(map(len, encoded))
    padded = [ids + [tokenizer.pad_id] * (width - len(ids)) for ids in encoded]
    yield Row("ids of BiRD's prompts", float(padded != texts["input_ids"]), 0.0)
    mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in encoded]
    yield Row("which ids are no padding", float(mask != texts["attention_mask"]), 0.0)


def with_labels(turns, tokenizer: QwenTokenizer) -> tuple[list[int], list[int]]:
    ids, counts = as_finetune(turns, tokenizer)
    return ids, [token if count else -100 for token, count in zip(ids, counts, strict=True)]


def check_processor(cases: dict, tokenizer: QwenTokenizer) -> Iterator[Row]:
    """Texts that BiRD's processor reads in one piece. What is not ChatML makes it fail, or shifts its labels; what asks
    here writes ChatML itself, so only the ids of such a text are compared.
    """
    system = chatml.turns_to_ids([], tokenizer)[0]
    for case in cases.values():
        if "error" in case:
            continue
        yield Row("ids of rendered texts", float(system + tokenizer.encode(case["text"]) != case["input_ids"]), 0.0)
        turns = _TURN.findall(case["text"])
        ids, labels = with_labels(turns, tokenizer)
        if ids == case["input_ids"]:  # whole ChatML
            yield Row("labels of rendered texts", float(labels != case["labels"]), 0.0)


def check_packs(cases: dict, made: Sequence[tuple], tokenizer: QwenTokenizer) -> Iterator[Row]:
    """Conversations in file order, each with its own system message, as many as fit."""
    packs, rest = [], list(made)
    for pack in cases["packs_max_length_250"]:
        ids, labels, images = [], [], []
        while rest and len(ids) + len(rest[0][0]) <= 250:
            one = rest.pop(0)
            ids, labels, images = ids + one[0], labels + one[1], images + ([one[2]] if one[2] else [])
        packs.append((ids, labels))
        yield Row("ids of packs", float(ids != pack["input_ids"] or labels != pack["labels"]), 0.0)
        yield Row("pictures of packs", float(images != pack["images"]), 0.0)
    collated = cases["collated"]
    padding = [250 - len(ids) for ids, _ in packs]
    ids = [ids + [tokenizer.pad_id] * beyond for (ids, _), beyond in zip(packs, padding, strict=True)]
    labels = [labels + [-100] * beyond for (_, labels), beyond in zip(packs, padding, strict=True)]
    yield Row("collated ids", float(ids != collated["input_ids"] or labels != collated["labels"]), 0.0)
    mask = [[int(token != tokenizer.pad_id) for token in row] for row in ids]
    yield Row("which ids are no padding", float(mask != collated["attention_mask"]), 0.0)
    pictures = [path for _, _, paths in made for path in paths]
    found = [path for paths in cases["collated_image_paths"] for path in paths]
    yield Row("collated pictures", float(found != pictures or collated["images_shape"][0] != len(pictures)), 0.0)
