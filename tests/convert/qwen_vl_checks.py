"""Converted Qwen-VL weights against what the original modules computed:

One function per sort of fixture of `golden/qwen_vl`.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import bird_grit
from convert import from_torch, kinds, mapping
from convert.foreign_config import Foreign
from medplib_jax.batch import Batch, Params, combine, flatten
from medplib_jax.config.experiment import LossConfig, OptimConfig
from medplib_jax.config.model import LoraConfig
from medplib_jax.data import images
from medplib_jax.data.qwen_tokenizer import QwenTokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.language.attention import Positions, attend_within, rotary_frequencies, rotary_tables
from medplib_jax.models.language.lora import merge_lora
from medplib_jax.models.layers import bind, layer_at, params_of
from medplib_jax.models.vision.clip import normalise_clip
from medplib_jax.models.vision.qwen_vit import SinCos, bicubic_weights, resize_table
from medplib_jax.train.losses import divisors, total_loss
from medplib_jax.train.optim import make_optimizer, make_schedule, partition
from tests.convert.checks import GRADIENT_BAR, Arrays, Converted, Row, as_torch, at_valid, differing, relative

SPAN = 16  # of the small fixtures


@dataclasses.dataclass(frozen=True)
class Fixture:
    """A converted checkpoint with the tokenizer and pictures that its fixtures use."""

    converted: Converted
    tokenizer: QwenTokenizer
    golden: pathlib.Path
    generators: dict[tuple, Generator] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @classmethod
    def load(cls, golden: pathlib.Path, *names: str, span: int = SPAN, **options) -> "Fixture":
        """names: folders below `golden`, the last with the tokenizer."""
        converted = Converted.load(*(golden / name for name in names), dtype="fp32", **options)
        return cls(converted, QwenTokenizer.load(str(golden / names[-1]), span), golden)

    def with_llm(self, **changes) -> "Fixture":
        config = self.converted.config
        changed = dataclasses.replace(config, llm=dataclasses.replace(config.llm, **changes))
        return dataclasses.replace(self, converted=dataclasses.replace(self.converted, config=changed))

    def picture(self, path: str) -> np.ndarray:
        pixels = images.load_pixels(str(self.golden / path))
        return images.stretched(pixels, self.converted.config.image_size)

    def batch(self, ids_BxL: np.ndarray, valid_BxL=None, labels_BxL=None) -> Batch:
        """Rows of ids as the original has them, paths in the pictures' spans; labels -100 where nothing counts."""
        ids = np.asarray(ids_BxL)
        rows, length = ids.shape
        found = [list(self._pictures(row)) for row in ids]
        slots, side = max(1, max(map(len, found))), self.converted.config.image_size
        pixels, index = np.zeros((rows, slots, side, side, 3), np.uint8), np.full((rows, length), -1, np.int32)
        for row, pictures in enumerate(found):
            for number, (start, path) in enumerate(pictures):
                pixels[row, number] = self.picture(path)
                index[row, start : start + self.span] = number * self.span + np.arange(self.span)
        targets, weights = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
        if labels_BxL is not None:
            targets[:, :-1] = np.maximum(labels_BxL[:, 1:], 0)
            weights[:, :-1] = labels_BxL[:, 1:] >= 0
        return Batch(
            tokens=ids.astype(np.int32),
            valid=np.ones(ids.shape, bool) if valid_BxL is None else np.asarray(valid_BxL, bool),
            targets=targets,
            loss_weights=weights,
            feature_index=index,
            clip_pixels=pixels,
            **without_masks(rows),
        )

    @property
    def span(self) -> int:
        return self.tokenizer.image_span

    def _pictures(self, ids: np.ndarray) -> Iterator[tuple[int, str]]:
        for start in np.flatnonzero(ids == self.tokenizer.image_ids[0]) + 1:
            inside = ids[start : start + self.span]
            yield int(start), bytes(inside[inside < 256].astype(np.uint8)).decode()

    def run(self, function: Callable, *arguments):
        """function(model, *arguments), compiled, with the converted parameters."""
        model = self.converted.model()
        return jax.jit(lambda params, *rest: function(bind(model, params), *rest))(self.converted.params, *arguments)

    def generate(self, batch: Batch, count: int, stop_ids=()) -> list[list[int]]:
        key = count, tuple(stop_ids or (self.tokenizer.eos_id,))
        if key not in self.generators:  # a program is compiled once for a generator
            config, params = self.converted.config, self.converted.params
            ends = {"stop_ids": key[1], "seg_id": -1}
            self.generators[key] = Generator(config, params, DecodeOptions(max_new_tokens=count, max_masks=0), **ends)
        made = jax.device_get(self.generators[key](batch))
        return [made.tokens[row, : made.lengths[row]].tolist() for row in range(len(made.lengths))]


def without_masks(rows: int) -> dict[str, np.ndarray]:
    """The fields of a batch whose model draws no masks."""
    return {
        "sam_pixels": np.zeros((rows, 0, 0, 3), np.uint8),
        "sam_box": np.zeros((rows, 4), np.int32),
        "region_points": np.zeros((rows, 0, 1, 2), np.float32),
        "region_point_valid": np.zeros((rows, 0, 1), bool),
        "region_image": np.zeros((rows, 0), np.int32),
        "seg_position": np.zeros((rows, 0), np.int32),
        "mask_valid": np.zeros((rows, 0), bool),
        "gt_masks": np.zeros((rows, 0, 1, 1), np.uint8),
        "mask_size": np.ones((rows, 2), np.int32),
        "record": np.arange(rows, dtype=np.int32),
    }


def check_visual(fixture: Fixture, z: Arrays, step: int = 1) -> Iterator[Row]:
    """ViT by block and resampler; stored arrays hold every `step`-th patch."""
    if "pixel_values" in z:
        pixels = z["pixel_values"].transpose(0, 2, 3, 1)
    else:
        pixels = np.asarray(normalise_clip(z["pixel_values_u8"]))
    features, out = fixture.run(_see, pixels)
    names = {
        "ln_pre": "pre_norm",
        "pool_kv_proj": "kv",
        "pool_key": "key",
        "pool_value": "value",
        "pool_query": "query",
        "pool_attn_out": "pooled",
        "ln_post": "post_norm",
        "positional_interp": "positions",
        "visual": "visual",
        "block_0_ln_1": "first/norm",
        "block_0_in_proj": "first/qkv",
        "block_0_attn_out": "first/attn",
        "block_0_mlp_out": "first/mlp",
    }
    names |= {f"block_{i}": f"block/{i}" for i in range(fixture.converted.config.vit.num_layers)}
    names |= {"pool_ln_kv": "value", "pool_ln_q": "query_norm", "pos_embed_interp": "key_positions"}
    thinned = {"ln_pre", "pool_kv_proj", "pool_key", "pool_value", "pool_ln_kv", *(f"block_{i}" for i in range(9))}
    for name, own in names.items():
        if name in z:
            ours = np.asarray(out[own])
            ours = ours[:, ::step] if name in thinned else ours
            ours = np.broadcast_to(ours, z[name].shape) if name == "pool_query" else ours
            yield Row(f"visual {name}", relative(ours, z[name]))
    if "conv1" in z:
        yield Row("visual conv1", relative(np.asarray(out["patches"]).transpose(0, 3, 1, 2), z["conv1"]))
    yield Row("visual", relative(features, z["visual"]))


def _see(model, pixels):
    features, out = model.resample(pixels)
    out["visual"] = features
    x, vit, pool = out["pre_norm"], model.vit, model.resampler
    for i in range(vit.config.num_layers):
        layer = layer_at(vit.layers, i)
        if not i:
            normed = layer.norm1(x)
            out |= {"first/norm": normed, "first/qkv": layer.attn.qkv(normed), "first/attn": layer.attn(normed)}
            out["first/mlp"] = layer.mlp(layer.norm2(x + out["first/attn"]))
        out[f"block/{i}"] = x = layer(x)
    out["query_norm"] = pool.norm_q(pool.query[...])
    out["key_positions"] = resize_table(pool.position_embed[...], pool.grid)
    return features, out


def check_position_tables(z: Arrays) -> Iterator[Row]:
    for name in z:
        if "grid_" in name:
            table, grid = z["table_4x4" if name.startswith("from_4x4") else "table"], int(name.rsplit("_", 1)[1])
            yield Row("interpolated positions", relative(resize_table(jnp.asarray(table), grid), z[name]))
    full = SinCos(16, 4096)()
    yield Row("sin-cos positions", relative(full[:, ::64], z["sincos_full_16x16_cols"]))
    wide = resize_table(jnp.asarray(full), 32)[::7, ::64]
    yield Row("sin-cos positions", relative(wide, z["sincos_full_interp_32x32_cols"]))
    yield Row("sin-cos positions", relative(SinCos(4, 128)(), z["sincos_128_4x4"]))
    yield Row("bicubic weights", relative(bicubic_weights(16, 32), z["weights_16_to_32"]))


def check_pictures(golden: pathlib.Path, z: Arrays) -> Iterator[Row]:
    for name in z:
        kind, side, picture = name.removesuffix("_rows").split("_", 2)
        stretched = images.stretched(images.load_pixels(str(golden / "data" / f"{picture}.png")), int(side))
        if kind == "u8":
            yield Row("pixels (share that differs)", differing(stretched, z[name]), 0.0)
        else:
            normalised = np.asarray(normalise_clip(stretched)).transpose(2, 0, 1)
            normalised = normalised[:, ::37, ::41] if name.endswith("_rows") else normalised
            yield Row("normalised pixels", relative(normalised, z[name]))


def check_forward(fixture: Fixture, z: Arrays) -> Iterator[Row]:
    """Embeddings, hidden states, attention, logits, losses and gradients of a teacher-forced pass."""
    batch = fixture.batch(z["input_ids"], z["attention_mask"], z["labels"])
    hidden, out = fixture.run(_forward, batch)
    stored = {"merged": out["embeddings"], "hidden_last": hidden, "logits": out["logits"]}
    blocks, attention = fixture.run(_blocks, batch, out["embeddings"])
    stored |= {f"hidden_{i}": block for i, block in enumerate(blocks, 1)}
    for name, ours in stored.items():
        for key in (name, name + "_at"):
            if key in z:
                yield Row(name, at_valid(ours, z[key], batch.valid))
    if "logits_last40" in z:
        yield Row("logits", relative(np.asarray(out["logits"])[:, -40:], z["logits_last40"]))
    if "attn_row0_layer0_last_query" in z:
        yield Row("attention weights", relative(attention, z["attn_row0_layer0_last_query"]))
    if "token_loss" in z:
        yield Row("losses of tokens", relative(token_losses(out["logits"], z["labels"]), z["token_loss"]))
    for name, train in (("loss", False), ("lossgrad", True)):
        if name in z:
            yield Row("loss", relative(fixture.run(functools.partial(_loss, train=train), batch)["loss"], z[name]))
    if any(name.startswith("gradnorm/") for name in z):
        yield from _check_gradients(fixture, gradients(fixture, batch), z)


def _forward(model, batch):
    output, out = model(batch)
    return output.hidden, out | {"logits": model.llm.logits(output.hidden)}


def _blocks(model, batch, x):
    """What each block but the last yields, and the first one's attention weights of the first row's last token."""
    llm, states = model.llm, []
    frequencies = rotary_frequencies(llm.config.llm.head_dim, llm.config.llm.rope_theta)
    positions = Positions(rotary_tables(jnp.arange(x.shape[1])[None], frequencies))
    for i in range(llm.config.llm.num_layers - 1):
        layer, mlp = layer_at(llm.layers, i), layer_at(llm.mlp, i)
        q, k, v = layer.attn.project(layer.input_norm(x), positions, None)
        if not i:
            last = batch.valid[0].sum() - 1
            scores = jnp.einsum("hk,shk->hs", q[0, last], k[0]) / np.sqrt(q.shape[-1])
            attention = jax.nn.softmax(jnp.where(jnp.arange(x.shape[1]) <= last, scores, -jnp.inf))
        x = x + layer.attn.output(attend_within(q, k, v, batch.valid), None)
        x = x + mlp(layer.post_norm(x), None)
        states.append(x)
    return states, attention


def token_losses(logits_BxLxV, labels_BxL) -> np.ndarray:
    """Cross entropy at each position but the last, 0 where the next label is -100."""
    labels = np.asarray(labels_BxL)[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV[:, :-1], np.maximum(labels, 0))
    return np.where(labels >= 0, losses, 0.0)


def _loss(model, batch, train=True):
    output, _ = model(batch, train=train)
    kernel = model.llm.head.kernel[...]
    return total_loss(output, kernel, batch, LossConfig(), model.config, divisors(batch))[1]


def gradients(fixture: Fixture, batch: Batch):
    model = fixture.converted.model()
    loss = jax.jit(jax.grad(lambda params, batch: _loss(bind(model, params), batch)["loss"]))
    return loss(fixture.converted.params, batch)


def _check_gradients(fixture: Fixture, tree: Params, z: Arrays, prefix: str = "") -> Iterator[Row]:
    places = fixture.converted.places()
    for name in z:
        kind, _, key = name.partition("/")
        if kind == prefix + "gradnorm":
            ours = as_torch(tree, places, key)
            yield Row("gradient norms", relative(np.linalg.norm(ours), z[name]), GRADIENT_BAR)
        elif kind == prefix + "grad":
            ours, rows = as_torch(tree, places, key), z.get(f"{prefix}gradrow/{key}")
            ours = ours if rows is None else ours[rows]
            ours = ours[tuple(slice(size) for size in z[name].shape)]
            yield Row("gradients", relative(ours, z[name]), GRADIENT_BAR)


def check_packed(fixture: Fixture, z: Arrays) -> Iterator[Row]:
    """A pack as BiRD trains on it (conversations see earlier ones), and each conversation as if alone."""
    batch = fixture.batch(z["input_ids"], z["attention_mask"], z["labels"])
    hidden, out = fixture.run(_forward, batch)
    yield Row("packed embeddings", at_valid(out["embeddings"], z["merged"], batch.valid))
    yield Row("packed logits", at_valid(out["logits"], z["logits_at"], batch.valid))
    yield Row("packed logits of Paddle", at_valid(out["logits"], z["paddle_logits_at"], batch.valid))
    for name in ("loss", "paddle_loss"):
        yield Row("packed loss", relative(fixture.run(_loss, batch)["loss"], z[name]))
    tree = gradients(fixture, batch)
    yield Row("gradients", relative(tree["resampler"]["position_embed"], z["grad_pos_embed"]), GRADIENT_BAR)
    yield from _check_gradients(fixture, tree, z)
    segments = segments_of(batch, fixture.tokenizer)
    labels = np.where(_within(batch, segments), batch.targets, -100)
    packed = batch.replace(segment=segments)
    _, out = fixture.run(_forward, packed)
    losses = token_losses(out["logits"], np.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=-100))
    alone = [
        (losses[row][segments[row, :-1] == number].sum(), (labels[row][segments[row] == number] >= 0).sum())
        for row in range(len(segments))
        for number in range(1, segments[row].max() + 1)
    ]
    yield Row("losses alone", relative([loss for loss, _ in alone], z["alone_loss_sum"]))
    yield Row("counted tokens alone", differing([count for _, count in alone], z["alone_tokens"]), 0.0)


def segments_of(batch: Batch, tokenizer: QwenTokenizer) -> np.ndarray:
    """Each conversation begins with its system message."""
    system = [tokenizer.im_start_id, *tokenizer.encode("system\n")]
    ids, segments = np.asarray(batch.tokens), np.zeros(batch.tokens.shape, np.int32)
    for row in range(len(ids)):
        starts = [i for i in range(ids.shape[1]) if ids[row, i : i + len(system)].tolist() == system]
        for number, start in enumerate(starts, 1):
            segments[row, start:] = number
    return np.where(batch.valid, segments, 0)


def _within(batch: Batch, segments: np.ndarray) -> np.ndarray:
    """Where the next token counts, but not where it is the next conversation's."""
    follows = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return (segments == follows) & (batch.loss_weights > 0)


# What trains in BiRD and with finetune.py's fix_vit.
TRAINABLE = ("^llm/", "^resampler/")
NO_DECAY = {"torch": ("/bias$", "^resampler/norm_"), "paddle": ("/bias$",)}


def check_optimizer(fixture: Fixture, z: Arrays, forward: Arrays) -> Iterator[Row]:
    """Five steps of AdamW with finetune.py's groups of decay and with Paddle's."""
    batch = fixture.batch(forward["input_ids"], forward["attention_mask"], forward["labels"])
    places, model = fixture.converted.places(), fixture.converted.model()
    start, frozen = partition(jax.tree.map(jnp.asarray, fixture.converted.params), TRAINABLE)
    for groups, no_decay in NO_DECAY.items():
        config = OptimConfig(lr=1e-3, weight_decay=0.1, warmup=0.01, schedule="cosine", no_decay=no_decay)
        schedule = make_schedule(config, 200, 200)
        tx = make_optimizer(config, start)

        @jax.jit
        def step(trainable, state, rate, tx=tx):
            loss, grads = jax.value_and_grad(
                lambda trainable: _loss(bind(model, combine(trainable, frozen)), batch)["loss"]
            )(trainable)
            updates, state = tx.update(grads, state, trainable, rate=rate)
            norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
            return jax.tree.map(jnp.add, trainable, updates), state, loss, norm

        trainable, state = start, tx.init(start)
        for i in range(len(z[f"{groups}/loss"])):
            trainable, state, loss, norm = step(trainable, state, schedule(i))
            yield Row("losses of five steps", relative(loss, z[f"{groups}/loss"][i]))
            yield Row("gradient norms of five steps", relative(norm, z[f"{groups}/gradnorm"][i]), GRADIENT_BAR)
            yield Row("rates", relative(schedule(i), z[f"{groups}/lr"][i]))
        for name in z:
            kind, _, key = name.removeprefix(groups + "/").partition("/")
            if name.startswith(groups) and kind in ("norm", "after"):
                ours = as_torch(trainable, places, key)
                ours = np.linalg.norm(ours) if kind == "norm" else _thinned(ours, z[name])
                yield Row("parameters after five steps", relative(ours, z[name]))


def _thinned(ours: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Every n-th row, as many as are stored."""
    return ours if ours.shape == stored.shape else ours[:: len(ours) // len(stored)]


def check_settings(fixture: Fixture, cases: dict) -> Iterator[Row]:
    """Rates of the schedule, the optimizer's numbers, and what weight decay shrinks."""
    for total, case in cases["cosine_rates_lr2e-5"].items():
        schedule = make_schedule(OptimConfig(lr=2e-5, warmup=0.01, schedule="cosine"), int(total), int(total))
        rates = case["rates"]
        for step, rate in rates.items() if isinstance(rates, dict) else enumerate(rates):
            yield Row("rates", abs(float(schedule(int(step))) - rate) / 2e-5)
        rising = [step for step in range(int(total)) if float(schedule(step)) < 2e-5][: case["warmup_steps"]]
        yield Row("warm-up", float(rising != list(range(case["warmup_steps"]))), 0.0)
    default, adamw = OptimConfig(), cases["adamw"]
    yield Row("AdamW", float([default.b1, default.b2, default.eps] != [*adamw["betas"], adamw["eps"]]), 0.0)
    decayed = {group["weight_decay"]: group["names"] for group in cases["torch_trainer_groups"]}
    yield Row("decayed by finetune.py", chosen_differ(fixture, NO_DECAY["torch"], decayed[0.0], decayed[0.1]), 0.0)
    others = set(sum(decayed.values(), [])) - set(cases["paddle_decayed"])
    yield Row("decayed by BiRD", chosen_differ(fixture, NO_DECAY["paddle"], others, cases["paddle_decayed"]), 0.0)


def check_frozen(fixture: Fixture, cases: dict) -> Iterator[Row]:
    """What BiRD trains and decays is what `configs/bird_grit.py` does."""
    ours, freeze = bird_grit.large().optim, cases["freeze"]
    wrong = chosen_differ(fixture, ours.trainable, freeze["trainable"], freeze["frozen"])
    yield Row("what trains", wrong, 0.0)
    decayed = cases["decayed_by_paddle_rule"]
    others = set(freeze["trainable"]) - set(decayed)
    yield Row("what is decayed", chosen_differ(fixture, ours.no_decay, others, decayed), 0.0)


def check_trainable(fixture: Fixture, cases: dict) -> Iterator[Row]:
    """What finetune.py's fix_vit trains is what BiRD trains."""
    frozen = set(cases["all"]) - set(cases["trainable"])
    wrong = chosen_differ(fixture, bird_grit.large().optim.trainable, cases["trainable"], frozen)
    yield Row("what trains", wrong, 0.0)


def chosen_differ(fixture: Fixture, patterns: Iterable[str], chosen: Collection[str], others: Collection[str]) -> float:
    """Share of PyTorch's (or Paddle's) names that some pattern of paths chooses wrongly."""
    places = fixture.converted.places()
    paths = {name: places[mapping.canonical(name)].path for name in (*chosen, *others)}
    found = {name for name, path in paths.items() if any(re.search(pattern, path) for pattern in patterns)}
    return len(found ^ set(chosen)) / len(paths)


def check_adapters(golden: pathlib.Path, z: Arrays) -> Iterator[Row]:
    forward = dict(np.load(golden / "forward_q16.npz"))
    for folder in ("lora/chat", "lora/chat_st"):
        fixture = Fixture.load(golden, folder, "ckpt_q16")
        batch = fixture.batch(forward["input_ids"], forward["attention_mask"], forward["labels"])
        _, out = fixture.run(_forward, batch)
        yield Row("logits with adapters", at_valid(out["logits"], z["chat_logits_at"], batch.valid))
        yield Row("loss with adapters", relative(fixture.run(_loss, batch)["loss"], z["chat_loss"]))
    yield from _check_gradients(fixture, gradients(fixture, batch), z, "chat_")
    merged = _merged(fixture)
    for name in z:
        kind, _, key = name.partition("/")
        if kind == "chat_merged":
            ours = as_torch(merged.converted.params, merged.converted.places(), key)
            yield Row("merged weights", relative(ours[::16], z[name]))
    _, out = merged.run(_forward, batch)
    yield Row("logits of merged weights", at_valid(out["logits"], z["chat_merged_logits_at"], batch.valid))
    full = Fixture.load(golden, "lora/base", "ckpt_q256", span=256)
    forward = dict(np.load(golden / "forward_q256.npz"))
    batch = full.batch(forward["input_ids"], forward["attention_mask"], forward["labels"])
    _, out = full.run(_forward, batch)
    yield Row("loss of a base model's adapter", relative(full.run(_loss, batch)["loss"], z["base_loss"]))
    yield Row("its logits", relative(np.asarray(out["logits"])[:, -20:], z["base_logits_last20"]))


def _merged(fixture: Fixture) -> Fixture:
    config = fixture.converted.config
    params, plain = merge_lora(fixture.converted.params, config.lora), dataclasses.replace(config, lora=LoraConfig())
    return dataclasses.replace(fixture, converted=dataclasses.replace(fixture.converted, config=plain, params=params))


def check_names(keys: dict) -> Iterator[Row]:
    """Every tensor of the full-size model has its place, and every parameter its tensor, on abstract shapes."""
    shapes = {key: tuple(shape) for key, shape in keys["shapes"].items()}
    config = kinds.detect_config(shapes, Foreign(keys["config"], {}, {}, {}, None))
    params = {path: leaf.shape for path, leaf in flatten(params_of(from_torch.model_shapes(config))).items()}
    plan = mapping.strict_plan(config, params, shapes)
    yield Row("names without a place", float(set(plan) != set(shapes)), 0.0)
    elements = sum(int(np.prod(shape)) for shape in params.values())
    yield Row("elements", float(elements != keys["n_elements"]), 0.0)
    for key, name in keys["paddle_names"].items():
        yield Row("Paddle's names", float(mapping.canonical(name) != key), 0.0)


def check_adapter_names(keys: dict) -> Iterator[Row]:
    """An adapter's names, saved or while training, are the table's; finetune.py loses what is no adapter."""
    for saved, training in zip(keys["chat"], keys["trainable_chat"], strict=True):
        yield Row("adapters' names", float(mapping.canonical(saved) != mapping.canonical(training)), 0.0)
    names = {
        kind: {name for name in map(mapping.canonical, keys[kind]) if not mapping.ignored(name)}
        for kind in ("trainable_base", "base_by_peft", "base_by_finetune")
    }
    yield Row("adapters' names", float(names["trainable_base"] != names["base_by_peft"]), 0.0)
    lost = names["base_by_peft"] - names["base_by_finetune"]
    yield Row("adapters' names", float(lost != {"transformer.wte.weight", "lm_head.weight"}), 0.0)
    ours, default = bird_grit.lora().model.lora, keys["defaults"]
    same = (ours.rank, ours.alpha, ours.dropout) == (default["r"], default["alpha"], default["dropout"])
    yield Row("adapters' settings", float(not same or default["bias"] != "none"), 0.0)
