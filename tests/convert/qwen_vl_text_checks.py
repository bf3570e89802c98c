"""What BiRD's text must be: ids, prompts, labels and boxes beside those that the original programs computed."""

from collections.abc import Iterator

from medplib_jax.data import boxes, chatml
from medplib_jax.data.qwen_tokenizer import SPECIALS, TAGS, QwenTokenizer
from tests.convert.checks import Row


def check_text(cases: dict, tokenizer: QwenTokenizer) -> Iterator[Row]:
    """Ids, labels and prompts; none may differ."""
    for case in cases["tokenize"]:
        ids = _ids_or_error(tokenizer, case["text"])
        yield Row("ids of texts", float(ids != case.get("ids")), 0.0)
        if ids is not None and "decoded" in case:
            yield Row("decoded texts", float(tokenizer.decode(ids, skip_special=False) != case["decoded"]), 0.0)
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

    for case in cases["make_context"].values():
        yield Row("prompts", float(as_make_context(case, tokenizer) != case["context_tokens"]), 0.0)


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
        found = [(box.corners, box.label) for box in boxes.read(case["text"])]
        firsts = [
            (corners, "" if label in [earlier for _, earlier in found[:i]] else label)
            for i, (corners, label) in enumerate(found)
        ]
        yield Row("boxes of texts", float(firsts != expected), 0.0)
    for case in cases["draw_bbox_on_latest_picture"]:
        width, height = case["size_wh"]
        found = [list(box.pixels(width, height)) for box in boxes.read(case["response"])]
        yield Row("boxes in pixels", float(found != [call[1] for call in case["calls"] if call[0] == "box"]), 0.0)


def check_examples(cases: dict, tokenizer: QwenTokenizer) -> Iterator[Row]:
    """BiRD's own training ids and labels of whole conversations."""
    for record, example in zip(cases["records"], cases["examples"], strict=True):
        turns = [
            (role, text)
            for pair in record["conversations"]
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        ids, counts = as_finetune(turns, tokenizer)
        labels = [token if count else -100 for token, count in zip(ids, counts, strict=True)]
        yield Row("ids of BiRD's examples", float(ids != example["input_ids"]), 0.0)
        yield Row("labels of BiRD's examples", float(labels != example["labels"]), 0.0)
