"""Conversations to token ids, targets and indices of spliced features.

After the original's `preprocess_v1` and its templates. Two steps that the original leaves to the device are done here:
an image stands for `image_tokens` positions and a region for one, and `feature_index` says which visual feature goes
there. Differences to the original: "ASSISTANT: " inside a text does not mask the labels, and a text longer than the
limit is an error instead of being cut.
"""

import dataclasses

import numpy as np

from medplib_jax.data.bpe_tokenizer import BpeTokenizer
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


def encode_conversation(record: Record, tokenizer: Tokenizer | BpeTokenizer, **settings) -> Encoded:
    """The whole conversation, for training; `settings`: see `_encode`.

    DataError when it has no answer, more than `max_length` positions, too many images, or images that do not pair up
    with `<image>`.
    """
    if record.turns[-1][0] != "gpt":
        raise record.error("conversation without an answer", "a gpt turn at the end", record.turns[-1][1])
    return _encode(record, record.turns, tokenizer, **settings)


def encode_question(record: Record, tokenizer: Tokenizer | BpeTokenizer, **settings) -> Encoded:
    """The conversation up to the last "ASSISTANT:", for evaluation.

    The answer that follows in the record is `Encoded.answer`.
    """
    turns, answer = record.turns, ""
    if turns[-1][0] == "gpt":
        turns, answer = turns[:-1], turns[-1][1]
    encoded = _encode(record, turns, tokenizer, **settings)
    return dataclasses.replace(
        encoded, seg_positions=(), masks=tuple(MASK.findall(answer)), answer=MASK.sub("", answer)
    )


def _encode(
    record: Record,
    turns,
    tokenizer: Tokenizer | BpeTokenizer,
    *,
    template: str,
    image_tokens: int,
    max_images: int,
    max_length: int,
    mask_tokens: int = 0,
    encoded_masks: tuple[bool, ...] | None = None,
) -> Encoded:
    """`encoded_masks`: which `<image>` stand for the `mask_tokens` of an example's mask; None: none."""
    is_mask = np.array(encoded_masks or (False,) * len(record.images), bool)
    if (pictures := int((~is_mask).sum())) > max_images:
        raise record.error("too many images", f"at most {max_images}", str(pictures))
    ids, is_answer = [tokenizer.bos_id], [False]
    prefix = TEMPLATES[template] + " "
    for role, text in turns:
        if role == "human":
            text = _place_images(text, single=record.examples is None and len(is_mask) == 1)
            new = _token_ids(f"{prefix}USER: {text} ASSISTANT:", tokenizer)
            prefix = ""
        else:  # the space after "ASSISTANT:" is the dummy space that SentencePiece puts before every chunk
            new = [*_token_ids(MASK.sub("", text), tokenizer), tokenizer.eos_id]
        ids += new
        is_answer += [role == "gpt"] * len(new)
    if (named := ids.count(_IMAGE_SLOT)) != len(is_mask):
        raise record.error("images and <image> do not pair up", f"{len(is_mask)} <image>", str(named))

    tokens, is_label, feature_index, region_images = _splice(
        np.array(ids), np.array(is_answer), is_mask, image_tokens, mask_tokens, max_images
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


def _token_ids(text: str, tokenizer: Tokenizer | BpeTokenizer) -> list[int]:
    """Ids with slots for images and, between `<region>` and `</region>`, for regions."""
    ids = []
    for i, chunk in enumerate(REGION.sub("<region></region>", text).split(_IMAGE)):
        ids += [_IMAGE_SLOT] if i else []
        for token in tokenizer.encode(chunk):
            if ids and (ids[-1], token) == tokenizer.region_ids:
                ids.append(_REGION_SLOT)
            ids.append(token)
    return ids


def _splice(ids, is_answer, is_mask, image_tokens, mask_tokens, max_images):
    """Widens image slots to `image_tokens` positions, or `mask_tokens` where they stand for an example's mask.

    Returns tokens, labels, feature indices, and the image of each region.
    """
    is_slot, is_region = ids == _IMAGE_SLOT, ids == _REGION_SLOT
    shows_mask = np.zeros(len(ids), bool)
    shows_mask[is_slot] = is_mask
    is_image = is_slot & ~shows_mask
    widths = np.where(is_image, image_tokens, np.where(shows_mask, mask_tokens, 1))
    starts = np.cumsum(widths) - widths
    source = np.repeat(np.arange(len(ids)), widths)
    within = np.arange(len(source)) - starts[source]
    image = np.cumsum(is_image) - 1  # the last image at or before each id
    mask = np.cumsum(shows_mask) - 1
    region = max_images * image_tokens + np.cumsum(is_region) - 1
    feature = np.select(
        [is_image[source], shows_mask[source], is_region[source]],
        [image[source] * image_tokens + within, -2 - (mask[source] * mask_tokens + within), region[source]],
        -1,
    )
    tokens = np.where(feature == -1, ids[source], 0).astype(np.int32)
    region_images = tuple(int(i) for i in np.maximum(image[is_region], 0))
    return tokens, is_answer[source] & (feature == -1), feature.astype(np.int32), region_images
