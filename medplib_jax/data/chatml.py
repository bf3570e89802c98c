"""Conversations in Qwen-VL's form: ChatML turns with pictures between `<img>` and `</img>` (finetune.py's preprocess,
make_context).

The i-th picture of a text is written `Picture i: <img>...</img>` on a line of its own; `image_tokens` positions stand
for it. Differences to the original: ChatML marks that someone typed are plain text, each content is tokenized by
itself, and a text longer than the limit is an error instead of being cut.
"""

import re
from collections.abc import Collection, Sequence

import numpy as np

from medplib_jax.data import boxes
from medplib_jax.data.encoded import Encoded
from medplib_jax.data.qwen_tokenizer import SPECIALS, QwenTokenizer
from medplib_jax.data.records import MASK, REGION, Record
from medplib_jax.data.tokenizers import AnyTokenizer

TEMPLATES = ("chatml", "qwen_raw")  # qwen_raw: BiRD's released inference, where the question stands alone
SYSTEM = "You are a helpful assistant."
# that may become ids inside of a turn
CONTENT_TAGS = frozenset(("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"))
_PICTURE = re.compile(r"(?:Picture \d+: ?)?<image>\n?")
_MARK = re.compile(r"<\|[^<>|]*\|>")
_SLOT = -1  # stands for a picture while ids are collected


def encode_conversation(
    record: Record, tokenizer: QwenTokenizer, *, template: str, image_tokens: int, max_images: int, max_length: int
) -> Encoded:
    """The whole conversation, for training. What counts is finetune.py's: every mark of ChatML with the line break
    behind it, and the answers.

    DataError as `prompts.encode_conversation`, for boxes that cannot be read or that no picture belongs to, and for
    references to masks and regions.
    """
    if record.turns[-1][0] != "gpt":
        raise record.error("conversation without an answer", "a gpt turn at the end", record.turns[-1][1])
    _check_turns(record, record.turns)
    ids, counts = turns_to_ids([(role, text) for role, text in record.turns], tokenizer)
    return _spliced(record, ids, counts, image_tokens, max_images, max_length)


def encode_question(
    record: Record, tokenizer: QwenTokenizer, *, template: str, image_tokens: int, max_images: int, max_length: int
) -> Encoded:
    """The conversation up to the place of its last answer, which is `Encoded.answer`.

    With template "qwen_raw" the last question's text alone.
    """
    turns, answer = record.turns, ""
    if turns[-1][0] == "gpt":
        turns, answer = turns[:-1], turns[-1][1]
    _check_turns(record, turns)
    if template == "qwen_raw":
        ids = _content(turns[-1][1], tokenizer, 0)[0]
    else:
        ids = turns_to_ids(turns, tokenizer)[0]
        ids += [tokenizer.im_start_id, *tokenizer.encode("assistant"), *tokenizer.encode("\n")]
    return _spliced(record, ids, [False] * len(ids), image_tokens, max_images, max_length, answer)


def stop_ids(template: str, tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """Before which ids an answer ends: BiRD's released inference stops at the end of the text alone."""
    return (tokenizer.eos_id,) if template == "qwen_raw" else tokenizer.stop_ids


def extract_answer(response: str) -> str:
    """What BiRD's scripts score of a raw response (extract_information):

    Up to the first full stop before an end mark, or what stands between its first two line breaks, without marks.
    """
    if (end := ".<|im_end|>") in response:
        response = response.split(end)[0] + "."
    response = response.replace("<|im_end|>\n", "")
    between = re.search(r"\n(.*?)\n", response, re.DOTALL)
    return (between[1] if between else response).replace("<|endoftext|>", "").strip()


def turns_to_ids(
    turns: Sequence[tuple[str, str]],
    tokenizer: QwenTokenizer,
    special: Collection[str] = CONTENT_TAGS,
    system: str = SYSTEM,
) -> tuple[list[int], list[bool]]:
    """Ids of ChatML turns behind the system message, with -1 for each `<image>`, and which of them count in the loss.

    special: strings of the contents that become ids; the original lets a user type all of them.
    """
    newline, pictures = tokenizer.encode("\n"), 0
    ids, counts = [], []
    for role, text in (("system", system), *turns):
        name = tokenizer.encode({"human": "user", "gpt": "assistant"}.get(role, role))
        content, pictures = _content(text, tokenizer, pictures, special)
        ids += [tokenizer.im_start_id, *name, *newline, *content, tokenizer.im_end_id, *newline]
        counts += [True] + [False] * (len(name) + len(newline)) + [role == "gpt"] * len(content)
        counts += [True] * (1 + len(newline))
    return ids, counts


def _content(
    text: str, tokenizer: QwenTokenizer, pictures: int, special: Collection[str] = CONTENT_TAGS
) -> tuple[list[int], int]:
    """Ids of a turn's text with a slot for each picture, and how many pictures there are up to its end."""
    if "<img>" in special:  # as the original renders it, with paths
        return tokenizer.encode(text, special), pictures
    ids = []
    for i, chunk in enumerate(_PICTURE.split(text)):
        if i:
            pictures += 1
            ids += tokenizer.encode(f"Picture {pictures}: ")
            ids += [tokenizer.image_ids[0], _SLOT, tokenizer.image_ids[1]]
            chunk = "\n" + chunk
        ids += tokenizer.encode(chunk, special)
    return ids, pictures


def _check_turns(record: Record, turns: Sequence[tuple[str, str]]) -> None:
    """DataError for what would be trained on or asked in a broken form."""
    for role, text in turns:
        unknown = [mark for mark in _MARK.findall(text) if mark not in SPECIALS]
        if unknown:
            raise record.error("unknown special token", "one of Qwen's, or none", unknown[0])
        if "<img>" in text or "</img>" in text:
            raise record.error("picture that is not one of the record's", "<image>", text)
        if REGION.search(text) or MASK.search(text):
            raise record.error("region or mask in the text", "boxes, as in Med-GRIT's form (`write_qa`)", text)
        try:
            found = boxes.parse(text) if role == "gpt" else boxes.parse(_without_open_box(text))
        except ValueError as error:
            raise record.error("boxes cannot be read", "<box>(x1,y1),(x2,y2)</box> of 0-999", str(error)) from error
        if found and not record.images:
            raise record.error("box without a picture", "a picture", "none")


def _without_open_box(text: str) -> str:
    """Qwen-VL's own grounding prompt ends in an open `<box>` that the answer goes on with."""
    return text.removesuffix("<box>")


def _spliced(record, ids, counts, image_tokens, max_images, max_length, answer="") -> Encoded:
    """Widens the pictures' slots to `image_tokens` positions."""
    if len(record.images) > max_images:
        raise record.error("too many images", f"at most {max_images}", str(len(record.images)))
    if ids.count(_SLOT) != len(record.images):
        raise record.error("images and <image> do not pair up", f"{len(record.images)} <image>", str(ids.count(_SLOT)))
    slots = np.array(ids) == _SLOT
    widths = np.where(slots, image_tokens, 1)
    source = np.repeat(np.arange(len(ids)), widths)
    if len(source) > max_length:
        raise record.error("text too long", f"at most {max_length} positions", str(len(source)))
    within = np.arange(len(source)) - (np.cumsum(widths) - widths)[source]
    image = (np.cumsum(slots) - 1)[source]
    is_feature = slots[source]
    tokens = np.where(is_feature, 0, np.array(ids)[source]).astype(np.int32)
    is_label = np.array(counts)[source] & ~is_feature
    return Encoded(
        tokens=tokens,
        targets=np.append(tokens[1:], 0).astype(np.int32),
        loss_weights=np.append(is_label[1:], False).astype(np.float32),
        feature_index=np.where(is_feature, image * image_tokens + within, -1).astype(np.int32),
        seg_positions=(),
        regions=(),
        region_images=(),
        masks=(),
        answer=answer,
    )
