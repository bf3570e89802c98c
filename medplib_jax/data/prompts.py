"""Conversations to token ids, targets and indices of spliced features.

After the original's `preprocess_v1` and its templates. Two steps that the original leaves to the device are done here:
an image stands for `image_tokens` positions and a region for one, and `feature_index` says which visual feature goes
there. Differences to the original: "ASSISTANT: " inside a text does not mask the labels, and a text longer than the
limit is an error instead of being cut.
"""

import dataclasses

import numpy as np

from medplib_jax.data.encoded import Encoded
from medplib_jax.data.records import MASK, REGION, Record
from medplib_jax.data.tokenizers import Tokenizer

_SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
TEMPLATES = {"llava_v1": _SYSTEM.format(who="human"), "v1": _SYSTEM.format(who="user")}
_IMAGE, _WRAPPED_IMAGE = "<image>", "<im_start><image><im_end>"
_IMAGE_SLOT, _REGION_SLOT = -1, -2  # stand for features while ids are collected


def encode_conversation(
    record: Record, tokenizer: Tokenizer, *, template: str, image_tokens: int, max_images: int, max_length: int
) -> Encoded:
    """The whole conversation, for training.

    DataError when it has no answer, more than `max_length` positions, too many images, or images that do not pair up
    with `<image>`.
    """
    if record.turns[-1][0] != "gpt":
        raise record.error("conversation without an answer", "a gpt turn at the end", record.turns[-1][1])
    return _encode(record, record.turns, tokenizer, template, image_tokens, max_images, max_length)


def encode_question(
    record: Record, tokenizer: Tokenizer, *, template: str, image_tokens: int, max_images: int, max_length: int
) -> Encoded:
    """The conversation up to the last "ASSISTANT:", for evaluation.

    The answer that follows in the record is `Encoded.answer`.
    """
    turns, answer = record.turns, ""
    if turns[-1][0] == "gpt":
        turns, answer = turns[:-1], turns[-1][1]
    encoded = _encode(record, turns, tokenizer, template, image_tokens, max_images, max_length)
    return dataclasses.replace(
        encoded, seg_positions=(), masks=tuple(MASK.findall(answer)), answer=MASK.sub("", answer)
    )


def _encode(record, turns, tokenizer, template, image_tokens, max_images, max_length) -> Encoded:
    if len(record.images) > max_images:
        raise record.error("too many images", f"at most {max_images}", str(len(record.images)))
    ids, is_answer = [tokenizer.bos_id], [False]
    prefix = TEMPLATES[template] + " "
    for role, text in turns:
        if role == "human":
            text = _place_images(text, single=len(record.images) == 1)
            new = _token_ids(f"{prefix}USER: {text} ASSISTANT:", tokenizer)
            prefix = ""
        else:  # the space after "ASSISTANT:" is the dummy space that SentencePiece puts before every chunk
            new = [*_token_ids(MASK.sub("", text), tokenizer), tokenizer.eos_id]
        ids += new
        is_answer += [role == "gpt"] * len(new)
    if ids.count(_IMAGE_SLOT) != len(record.images):
        raise record.error(
            "images and <image> do not pair up", f"{len(record.images)} <image>", str(ids.count(_IMAGE_SLOT))
        )

    tokens, is_label, feature_index, region_images = _splice(
        np.array(ids), np.array(is_answer), image_tokens, max_images
    )
    if region_images and not record.images:
        raise record.error("region without an image", "an image", "none")
    if len(tokens) > max_length:
        raise record.error("text too long", f"at most {max_length} positions", str(len(tokens)))
    return Encoded(
        tokens=tokens,
        targets=np.append(tokens[1:], 0).astype(np.int32),
        loss_weights=np.append(is_label[1:], False).astype(np.float32),
        feature_index=feature_index,
        seg_positions=tuple(int(i) - 1 for i in np.flatnonzero((tokens == tokenizer.seg_id) & is_label)),
        regions=tuple(reference.strip() for _, text in turns for reference in REGION.findall(text)),
        region_images=region_images,
        masks=tuple(mask for _, text in turns for mask in MASK.findall(text)),
        answer="",
    )


def _place_images(text: str, single: bool) -> str:
    """One image goes to the front of its turn, as in the original; several stay where they are named."""
    if _IMAGE not in text:
        return text
    if single:
        return (_WRAPPED_IMAGE + "\n" + text.replace(_IMAGE, "").strip()).strip()
    return text.replace(_IMAGE, _WRAPPED_IMAGE)


def _token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids with slots for images and, between `<region>` and `</region>`, for regions."""
    ids = []
    for i, chunk in enumerate(REGION.sub("<region></region>", text).split(_IMAGE)):
        ids += [_IMAGE_SLOT] if i else []
        for token in tokenizer.encode(chunk):
            if ids and (ids[-1], token) == tokenizer.region_ids:
                ids.append(_REGION_SLOT)
            ids.append(token)
    return ids


def _splice(ids, is_answer, image_tokens, max_images):
    """Widens image slots to `image_tokens` positions.

    Returns tokens, labels, feature indices, and the image of each region.
    """
    is_image, is_region = ids == _IMAGE_SLOT, ids == _REGION_SLOT
    widths = np.where(is_image, image_tokens, 1)
    starts = np.cumsum(widths) - widths
    source = np.repeat(np.arange(len(ids)), widths)
    within = np.arange(len(source)) - starts[source]
    image = np.cumsum(is_image) - 1  # the last image at or before each id
    region = max_images * image_tokens + np.cumsum(is_region) - 1
    feature = np.where(
        is_image[source], image[source] * image_tokens + within, np.where(is_region[source], region[source], -1)
    )
    tokens = np.where(feature < 0, ids[source], 0).astype(np.int32)
    region_images = tuple(int(i) for i in np.maximum(image[is_region], 0))
    return tokens, is_answer[source] & (feature < 0), feature.astype(np.int32), region_images
