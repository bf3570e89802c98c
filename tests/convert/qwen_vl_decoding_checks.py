"""Qwen-VL's decoding beside the original's: prompts beyond the trained length, greedy answers, padded batches, whole
answers with boxes.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.config.model import LlmConfig
from medplib_jax.data import boxes
from medplib_jax.data.qwen_tokenizer import QwenTokenizer
from medplib_jax.models.language.attention import Positions, attend, rotary_frequencies, rotary_tables
from medplib_jax.models.language.long_context import log_n, ntk_frequencies, ntk_index
from medplib_jax.models.layers import layer_at
from tests.convert.checks import Arrays, Row, differing, relative
from tests.convert.qwen_vl_checks import Fixture

LENGTHS = (60, 64, 65, 128, 129, 197)
SHORT = {"trained_length": 64, "max_positions": 8192}  # of the fixtures' long prompts
SURE = 1e-3  # a choice between scores closer than this may fall either way


def check_long_context(fixture: Fixture, z: Arrays) -> Iterator[Row]:
    """NTK and log-n of a model whose trained length is 64, and their tables at full size."""
    long = fixture.with_llm(**SHORT)
    for length in LENGTHS:
        ids, places = z[f"ids_{length}"], z[f"pos_{length}"]
        ours = _logits(long, ids)[0, places]
        yield Row("logits beyond the trained length", relative(ours, z[f"logits_{length}"]))
        yield Row("NTK's alpha", relative(_alpha(length, long), z[f"alpha_{length}"]), 0.0)
    ids, places = z["ids_129"], z["pos_129"]
    for name, llm in (("ntk", {"ntk": False}), ("logn", {"log_n": False})):
        ours = _logits(fixture.with_llm(**SHORT, **llm), ids)[0, places]
        yield Row(f"logits without {name}", relative(ours, z[f"logits_129_no_{name}"]))
    yield Row("logits in training", relative(_logits(long, ids, train=True)[0, places], z["logits_train_129"]))
    # The original keeps the alpha of an earlier prompt for training: here that is another base.
    llm = fixture.converted.config.llm
    stale = llm.rope_theta * float(z["alpha_129"]) ** (llm.head_dim / (llm.head_dim - 2))
    ours = _logits(fixture.with_llm(rope_theta=stale, trained_length=0), z["ids_60"])[0, z["pos_60"]]
    yield Row("logits in training with a stale alpha", relative(ours, z["stale_logits_train"]))
    for name in ("border", "beyond"):
        yield from _check_long_generation(long, {k.removeprefix(f"gen_{name}_"): z[k] for k in z if name in k})
    yield from _check_tables(z)


def _check_long_generation(long: Fixture, z: Arrays) -> Iterator[Row]:
    """Greedy answers whose text grows past a border of NTK, with a cache and without."""
    ids, expected = z["ids"], z["sequences"][0]
    new = expected[ids.shape[1] :]
    made = long.generate(long.batch(ids), len(new))[0]
    yield Row("ids generated beyond it", _differs_before_end(made, new, long), 0.0)
    yield Row("scores generated beyond it", relative(_step_scores(long, ids, new), z["scores"][0]))
    yield Row("NTK's alpha", relative(_alpha(ids.shape[1], long), z["alpha"]), 0.0)
    # Without a cache the alpha follows the growing text: as if each prefix were a prompt.
    whole = z["nocache_sequences"][0]
    lengths = np.arange(ids.shape[1], len(whole))
    prefixes = np.where(np.arange(len(whole)) < lengths[:, None], whole, 0)
    logits = _logits(long, prefixes, np.arange(len(whole)) < lengths[:, None])
    scores = logits[np.arange(len(lengths)), lengths - 1]
    yield Row("ids generated without a cache", differing(scores.argmax(-1), whole[lengths]), 0.0)
    yield Row("scores generated without a cache", relative(scores[-1], z["nocache_last_scores"][0]))


def _check_tables(z: Arrays) -> Iterator[Row]:
    for dim in (64, 128):
        table = ntk_frequencies(
            LlmConfig(hidden_size=dim, num_heads=1, num_kv_heads=1, trained_length=2048, max_positions=16384)
        )
        for index, alpha in enumerate((1, 3, 7, 15)):
            yield Row("rotary frequencies", relative(table[index], z[f"inv_freq_{dim}_alpha{alpha}"]))
    tables = rotary_tables(z["rope_pos"][None], jnp.asarray(table[1]))
    for half in (slice(64), slice(64, None)):
        yield Row("rotary tables", relative(tables[0][0], z["rope_cos_128_alpha3"][:, half]))
        yield Row("rotary tables", relative(tables[1][0], z["rope_sin_128_alpha3"][:, half]))
    yield Row("log-n", relative(log_n(z["logn_index_1based"][None] - 1, 2048)[0], z["logn_2048"]))
    sizes = LlmConfig(trained_length=2048, max_positions=65536)
    alphas = 2.0 ** (1 + np.asarray(ntk_index(jnp.asarray(z["alpha_table_len"]), sizes))) - 1
    yield Row("NTK's alpha", relative(alphas, z["alpha_table_2048"]), 0.0)


def _alpha(length: int, fixture: Fixture) -> float:
    return 2.0 ** (1 + int(ntk_index(jnp.array([length]), fixture.converted.config.llm)[0])) - 1


def _logits(fixture: Fixture, ids_BxL, valid_BxL=None, train: bool = False) -> np.ndarray:
    def run(model, batch):
        return model.llm.logits(model(batch, train=train)[0].hidden)

    return np.asarray(fixture.run(run, fixture.batch(ids_BxL, valid_BxL)))


def _logits_at(fixture: Fixture, ids_BxL, valid_BxL, positions_BxL) -> np.ndarray:
    """Logits with rotary positions of one's own, below the trained length."""

    def run(model, batch, positions_BxL):
        llm, x = model.llm, model.embed(batch)[0]
        frequencies = rotary_frequencies(llm.config.llm.head_dim, llm.config.llm.rope_theta)
        positions, index = Positions(rotary_tables(positions_BxL, frequencies)), jnp.arange(x.shape[1])[None]
        for i in range(llm.config.llm.num_layers):
            layer, mlp = layer_at(llm.layers, i), layer_at(llm.mlp, i)
            q, k, v = layer.attn.project(layer.input_norm(x), positions, None)
            y = attend(q, k, v, query_position_BxL=index, key_valid_BxS=batch.valid)
            x = x + layer.attn.output(y, None)
            x = x + mlp(layer.post_norm(x), None)
        return llm.logits(llm.final_norm(x))

    return np.asarray(fixture.run(run, fixture.batch(ids_BxL, valid_BxL), jnp.asarray(positions_BxL)))


def _step_scores(fixture: Fixture, ids_1xL: np.ndarray, new_T: np.ndarray) -> np.ndarray:
    """The scores [T, V] from which each of the new ids was drawn, with the cache of the prompt."""

    def run(model, batch: Batch, more_1xT):
        x, _ = model.embed(batch)
        hidden, out = model.llm(x, batch.valid, new_cache=ids_1xL.shape[1] + more_1xT.shape[1])
        x = model.llm.embed(more_1xT)
        later, _ = model.llm(x, jnp.ones(more_1xT.shape, bool), cache=out["cache"])
        return model.llm.logits(jnp.concatenate([hidden[:, -1:], later], axis=1))[0]

    return np.asarray(fixture.run(run, fixture.batch(ids_1xL), np.asarray(new_T)[None, :-1]))


def _differs_before_end(made: list[int], expected: np.ndarray, fixture: Fixture) -> float:
    """Ids up to the end of the text."""
    ends = np.flatnonzero(expected == fixture.tokenizer.eos_id)
    expected = expected[: ends[0]] if len(ends) else expected
    return float(made[: len(expected)] != expected.tolist() or (len(ends) > 0 and len(made) != len(expected)))


def check_generation(fixture: Fixture, z: Arrays) -> Iterator[Row]:
    """Greedy answers: of a chat, behind a history, before a stop word, of prompts alone and of padded batches."""
    for name in [name.removesuffix("_ids") for name in z if name.endswith("_ids") and f"{name[:-4]}_mask" not in z]:
        ids = z[f"{name}_ids"]
        expected = z[f"{name}_sequences"][0, ids.shape[1] :]
        made = fixture.generate(fixture.batch(ids), len(expected))[0]
        yield Row("generated ids", _differs_before_end(made, expected, fixture), 0.0)
        scores = _step_scores(fixture, ids, expected)
        if f"{name}_scores" in z:
            yield Row("scores", relative(scores, z[f"{name}_scores"][0]))
        else:
            yield Row("scores", relative(scores[:1], z[f"{name}_first_scores"]))
    ids, stop = z["chat_ids"], int(z["stop_word"])
    made = fixture.generate(fixture.batch(ids), 24, stop_ids=(stop,))[0]
    expected = z["stop_sequences"][0, ids.shape[1] :].tolist()
    yield Row("ids before a stop word", float(made != expected[: expected.index(stop)]), 0.0)
    before = expected.index(stop) + 1  # behind it the original forces the end
    scores = _step_scores(fixture, ids, np.array(expected[:before]))
    yield Row("scores", relative(scores, z["stop_scores"][0, :before]))
    for name in ("left", "right"):
        yield from check_padded(
            fixture, z[f"{name}_ids"], z[f"{name}_mask"], z[f"{name}_sequences"], name, z[f"{name}_scores"]
        )


def check_padded(
    fixture: Fixture, ids_BxL, mask_BxL, sequences_BxT, side: str, scores_BxSxV: np.ndarray | None = None
) -> Iterator[Row]:
    """A batch as the original pads it: the next id is read at the last position, which on the right may be padding.

    Without scores it is Paddle's, which counts positions without padding; PyTorch's counts all. A generator here pads
    on the right and reads each row at its own end, so its answers are the left-padded batch's.
    """
    ids, mask, sequences = np.asarray(ids_BxL), np.asarray(mask_BxL, bool), np.asarray(sequences_BxT)
    length, steps = ids.shape[1], sequences.shape[1] - ids.shape[1]
    valid = np.concatenate([mask, np.ones((len(ids), steps), bool)], axis=1)
    every = np.broadcast_to(np.arange(valid.shape[1]), valid.shape)
    counted = np.where(valid, np.cumsum(valid, axis=1) - 1, 0) if scores_BxSxV is None else every
    logits = _logits_at(fixture, sequences, valid, counted)[:, length - 1 : -1]
    allowed = np.ones_like(logits, bool) if scores_BxSxV is None else np.isfinite(scores_BxSxV)
    choices = np.where(allowed, logits, -np.inf)  # before a least number of tokens the end is no choice
    first, second = np.sort(choices, axis=-1)[..., :-3:-1].transpose(2, 0, 1)
    sure = first - second > SURE
    yield Row(
        f"ids of a batch padded on the {side}", differing(choices.argmax(-1)[sure], sequences[:, length:][sure]), 0.0
    )
    if scores_BxSxV is not None:
        yield Row(f"scores of a batch padded on the {side}", relative(choices[allowed], scores_BxSxV[allowed]))
    if side == "left":
        yield Row("ids of a batch of rows of different lengths", _generated_differ(fixture, ids, mask, sequences), 0.0)


def _generated_differ(fixture: Fixture, ids, mask, sequences) -> float:
    """Whether the generator's rows begin as the sequences do, up to an end or a choice that is not sure."""
    lengths, width = mask.sum(1), ids.shape[1]
    rows = np.full_like(ids, fixture.tokenizer.eos_id)
    for row, length in enumerate(lengths):
        rows[row, :length] = ids[row][mask[row]]
    together = fixture.generate(fixture.batch(rows, np.arange(width) < lengths[:, None]), 8)
    alone = [fixture.generate(fixture.batch(ids[row : row + 1, mask[row]]), 8)[0] for row in range(len(ids))]
    wrong = [made != one for made, one in zip(together, alone, strict=True)]
    wrong += [made[0] != sequences[row, width] for row, made in enumerate(together) if made]
    return float(np.mean(wrong))


def check_raw_batches(fixture: Fixture, cases: dict) -> Iterator[Row]:
    """BiRD's released inference: raw prompts, alone, padded on the left, and in its own batch padded on the right."""
    for side, name in (("left", "left"), ("right", "batch")):
        ids, mask, new = cases[name]
        yield from check_padded(fixture, ids, mask, np.concatenate([ids, new], axis=1), side)
    for row in range(len(cases["texts"])):
        ids, _, (expected,) = cases[f"single_{row}"]
        made = fixture.generate(fixture.batch(np.array(ids)), len(expected))[0]
        yield Row("ids of raw prompts", _differs_before_end(made, np.array(expected), fixture), 0.0)


def check_answers(fixture: Fixture, cases: dict) -> Iterator[Row]:
    """Whole answers of the over-fitted model: prompt to ids, text and boxes, in ChatML and in BiRD's raw form."""
    tokenizer = fixture.tokenizer
    for item in cases["items"]:
        chat, raw = item["chat_prompt_ids"], item["raw_prompt_ids"]
        yield Row("prompt ids", float(tokenizer.encode(item["question"]) != raw), 0.0)
        made = fixture.generate(_widened(fixture, chat), 100, tokenizer.stop_ids)[0]
        yield Row("answers in ChatML", float(tokenizer.decode(made) != item["chat_text"]), 0.0)
        found = [(list(box.corners), box.label) for box in boxes.read(tokenizer.decode(made))]
        expected, label = [], ""
        for box in item["chat_boxes"]:
            label = box.get("ref", label)
            expected.append((box["box"], label))
        yield Row("boxes of answers", float(found != expected), 0.0)
        made = fixture.generate(_widened(fixture, raw), 100)[0]
        expected = np.array(item["raw_sequence"][len(raw) :])
        yield Row("raw answers", _differs_before_end(made, expected, fixture), 0.0)
        response = tokenizer.decode([*made, tokenizer.eos_id], skip_special=False)
        yield Row("raw answers", float(response != item["raw_response"]), 0.0)


def _widened(fixture: Fixture, ids: list[int], multiple: int = 64) -> Batch:
    """A prompt padded on the right, so that prompts of about one length share a program."""
    width = -(-len(ids) // multiple) * multiple
    row = np.array([ids + [fixture.tokenizer.eos_id] * (width - len(ids))])
    return fixture.batch(row, np.arange(width)[None] < len(ids))


def check_texts(tokenizer: QwenTokenizer, cases: dict, z: Arrays) -> Iterator[Row]:
    """The texts of the recorded ids. The original's own lacks the last token where no mark of ChatML ends it."""
    ids = z["chat_sequences"][0].tolist()
    answer = ids[z["chat_ids"].shape[1] :]
    yield Row("texts", float(tokenizer.decode(ids, skip_special=False) != cases["chat"]["decoded"]), 0.0)
    asked = tokenizer.decode(z["chat_ids"][0], skip_special=False)
    yield Row("texts", float(asked != cases["chat"]["raw_text"]), 0.0)
    yield Row("texts", float(tokenizer.decode(answer[:-1], skip_special=False).strip() != cases["chat"]["text"]), 0.0)
    for row, text in enumerate(cases["batch_texts"]):
        yield Row("ids of texts", float(tokenizer.encode(text) != z[f"single_{row}_ids"][0].tolist()), 0.0)
