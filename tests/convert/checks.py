"""How converted weights are compared with recorded arrays of the original program, one function per sort of fixture."""

import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from convert import from_torch, mapping, to_torch, torch_files
from medplib_jax import checkpoint
from medplib_jax.batch import Batch, combine, flatten, unflatten
from medplib_jax.config.experiment import LossConfig, OptimConfig
from medplib_jax.config.model import IclConfig, ModelConfig
from medplib_jax.data.tokenizers import load_tokenizer
from medplib_jax.models.layers import bind
from medplib_jax.models.masks.sam import normalise_sam
from medplib_jax.models.masks.unpad import resample_to_canvas
from medplib_jax.models.whole import ModelOutput
from medplib_jax.train.losses import divisors, total_loss
from medplib_jax.train.optim import make_optimizer, make_schedule, partition
from tests.convert.golden_batch import IMAGE, SAM_SIDE, golden_batch

BAR, GRADIENT_BAR = 1e-4, 1e-3
SEG_LOSS = LossConfig(ce=1.0, dice=0.5, bce=2.0, iou=2.0, focal=2.0)
STAGE4_LOSS = LossConfig(ce=1.0, dice=0.5, bce=2.0)
LOSS_NAMES = {
    "language": "ce_loss",
    "bce": "unscale_mask_bce_loss",
    "dice": "unscale_mask_dice_loss",
    "focal": "unscale_mask_focal_loss",
    "iou": "unscale_mask_iou_loss",
}
ALWAYS_ZERO = re.compile(r"mask_decoder\..*k_proj\.bias$")  # softmax does not see a key's bias

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: the largest relative error of one kind of array, and what it may be."""

    what: str
    error: float
    bar: float = BAR


def relative(actual, expected) -> float:
    """Largest difference over the largest magnitude; infinite when the shapes differ."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12))


def at_valid(actual_BxLxD, expected_BxlxD, valid_BxL) -> float:
    """`relative` over the positions that are not padding; the recorded array may hold every n-th position only."""
    step = -(-actual_BxLxD.shape[1] // expected_BxlxD.shape[1])
    chosen = np.asarray(valid_BxL)[:, ::step]
    return relative(np.asarray(actual_BxLxD)[:, ::step][chosen], expected_BxlxD[chosen])


def at_steps(actual_IxJ, expected_ixj) -> float:
    """`relative` of a picture, of which the recorded one may hold every n-th row and column only."""
    step = -(-actual_IxJ.shape[0] // expected_ixj.shape[0])
    return relative(actual_IxJ[::step, ::step], expected_ixj)


def differing(actual, expected) -> float:
    """Share of entries that are not equal: for ids and choices, which allow none."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return float((actual != expected).mean()) if actual.shape == expected.shape else float("inf")


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted checkpoint in memory, and where each PyTorch tensor of it is."""

    config: ModelConfig
    params: dict
    seg_id: int

    @classmethod
    def load(cls, *sources: pathlib.Path, **options) -> "Converted":
        """Through the command line's function and the project's loader, as a user would."""
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "converted"
            from_torch.convert(from_torch.Options(tuple(sources), out, **options))
            experiment, params, tokenizer = checkpoint.load_params(str(out))
            seg_id = load_tokenizer(tokenizer).seg_id if "llm" in params else -1
        moe = dataclasses.replace(experiment.model.moe, dispatch="capacity")
        mask = dataclasses.replace(experiment.model.mask, unpad="reference")
        return cls(dataclasses.replace(experiment.model, moe=moe, mask=mask), params, seg_id)

    def with_moe(self, **changes) -> "Converted":
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, moe=dataclasses.replace(self.config.moe, **changes))
        )

    def with_examples(self, z: Arrays) -> "Converted":
        """With the modules that the recorded numbers of tokens tell (`token_lengths` of pictures and of masks)."""
        is_mask, lengths = z["token_is_mask"], z["token_lengths"]
        pictures, masks = set(lengths[~is_mask].tolist()), set(lengths[is_mask].tolist())
        compressed = 0 if pictures == {self.config.clip.num_patches} else pictures.pop()
        kept = {"compressor": compressed, "mask_encoder": masks.pop() if masks else 0}
        icl = IclConfig("separate" if kept["mask_encoder"] else "overlay", *kept.values())
        modules = {name: self.params["icl"][name] for name, tokens in kept.items() if tokens}
        params = {name: part for name, part in self.params.items() if name != "icl"}
        params |= {"icl": modules} if modules else {}
        return dataclasses.replace(self, config=dataclasses.replace(self.config, icl=icl), params=params)

    def with_tensors(self, tensors: Arrays) -> "Converted":
        """With some parameters replaced by (PyTorch-shaped) tensors."""
        flat = {path: np.array(leaf) for path, leaf in flatten(self.params).items()}
        places = self.places()
        for key, value in tensors.items():
            flat[places[key].path][places[key].index] = places[key].layout.to_jax(value)
        return dataclasses.replace(self, params=unflatten(flat))

    def places(self) -> dict[str, mapping.Entry]:
        return mapping.entries(self.config, flatten(self.params))

    def batch(self, z: Arrays) -> Batch:
        return golden_batch(z, self.seg_id, self.config.image_tokens, self.config.icl.mask_tokens)

    def model(self):
        return from_torch.model_shapes(self.config)


def as_torch(tree, places: Mapping[str, mapping.Entry], key: str) -> np.ndarray:
    """One PyTorch tensor's part of a parameter-shaped tree."""
    place = places[mapping.canonical(key)]
    return place.layout.to_torch(np.asarray(flatten(tree)[place.path])[place.index])


def forward(model, batch: Batch, train: bool, noise, embedding=None, seg_row=None):
    """`MedPLIB.__call__` with the router's noise and SAM's image embedding (which nothing is trained through) given.

    `seg_row` [B, M] is the row that a mask's <SEG> stands in; see `seg_rows`.
    """
    x, out = model.embed(batch)
    hidden, llm_out = model.llm(x, batch.valid, train=train, router_noise=noise)
    masks = (None, None)
    if embedding is not None:
        out["seg_embedding"] = model.seg_mlp(hidden[seg_row, batch.seg_position])
        masks = model.sam.decode(embedding, out["seg_embedding"])
    return ModelOutput(hidden, *masks, aux=llm_out), out | llm_out | {"logits": model.llm.logits(hidden)}


def seg_rows(batch: Batch, seg_id: int, z: Arrays) -> tuple[Batch, np.ndarray]:
    """The batch with each mask at the <SEG> that the original gives it, and the row of that <SEG>: the last of the
    batch, in order.

    It is another row's when a row says <SEG> without having a mask (forward_seg_eval_56), which our data refuses. It is
    a neighbour of <SEG> where the original lost a row's pictures but counts their tokens (icl_separate_maskenc).
    """
    slots = np.argwhere(batch.mask_valid)
    places = np.argwhere(batch.tokens == seg_id)[-len(slots) :]
    if len(z.get("token_is_mask", ())) > (z["input_ids"] == IMAGE).sum():
        places = np.argwhere(z["seg_token_mask"]) + [0, 1]
    rows, positions = np.zeros_like(batch.seg_position), np.zeros_like(batch.seg_position)
    rows[tuple(slots.T)], positions[tuple(slots.T)] = places[:, 0], places[:, 1] - 1
    return batch.replace(seg_position=positions), rows


def image_embedding(converted: "Converted", batch: Batch):
    model = converted.model()
    encode = jax.jit(lambda params, pixels, box: bind(model, params).sam.encode(normalise_sam(pixels, box)))
    return encode(converted.params, batch.sam_pixels, batch.sam_box)


def router_noise(z: Arrays, kind: str, layers) -> np.ndarray | None:
    names = [f"noise_{kind}{layer}" for layer in layers]
    return np.stack([z[name] for name in names]) if names[0] in z else None


def check_forward(converted: Converted, z: Arrays) -> Iterator[Row]:
    """Question answering and regions, in eval and in train mode: from CLIP's features to logits and loss."""
    batch, model = converted.batch(z), converted.model()
    kind = "uniform" if converted.config.moe.top_k == 1 else "gumbel"
    for train, prefix in ((False, ""), (True, "train_")):
        noise = router_noise(z, kind if train else f"eval_{kind}", converted.config.moe_layers)
        if not train and noise is None and kind == "uniform":
            noise = router_noise(z, kind, converted.config.moe_layers)
        run = jax.jit(lambda params, batch, train=train, noise=noise: forward(bind(model, params), batch, train, noise))
        output, out = run(converted.params, batch)
        if not train and "clip_features" in z:
            yield Row("clip features", relative(out["clip_features"], z["clip_features"]))
        if not train:
            yield from _check_spliced(z, batch, out)
        yield from _language(converted, z, batch, output, out, prefix, "train " if train else "eval ")


def _check_spliced(z, batch, out) -> Iterator[Row]:
    """What takes the place of image and region tokens."""
    if "inputs_embeds" in z:
        yield Row("merged embeddings", at_valid(out["embeddings"], z["inputs_embeds"], batch.valid))
    if "region_feature_0" in z:
        for i, row in enumerate(np.flatnonzero(z["valid_region"])):
            yield Row("region features", relative(out["regions"][row, :1], z[f"region_feature_{i}"]))


def _language(converted, z, batch, output, out, prefix, mode) -> Iterator[Row]:
    yield from check_router(converted, z, batch, out, prefix, mode)
    if prefix + "hidden_last" in z:
        yield Row(mode + "hidden states", at_valid(output.hidden, z[prefix + "hidden_last"], batch.valid))
    if prefix + "logits" in z:
        yield Row(mode + "logits", at_valid(out["logits"], z[prefix + "logits"], batch.valid))
    elif prefix + "logits_sel" in z:
        chosen = np.asarray(out["logits"])[:, z["logits_pos"]]
        yield Row(mode + "logits", at_valid(chosen, z[prefix + "logits_sel"], batch.valid[:, z["logits_pos"]]))
    loss = lambda output, head, batch: total_loss(output, head, batch, LossConfig(), converted.config, divisors(batch))
    _, terms = jax.jit(loss)(output, converted.params["llm"]["head"]["kernel"], batch)
    yield Row(mode + "loss", relative(terms["loss"], z[prefix + "loss"]))


def check_router(converted, z, batch, out, prefix, mode) -> Iterator[Row]:
    """Router logits, chosen experts and dropped choices of every layer."""
    valid = np.asarray(batch.valid).reshape(-1)
    logits, chosen, drops = [], [], []
    for i, layer in enumerate(converted.config.moe_layers):
        name = f"{prefix}moe{layer}_"
        if name + "router_logits" not in z:
            continue
        expected = z[name + "router_logits"][valid]
        logits.append(relative(np.asarray(out["router_logits"][i]).reshape(len(valid), -1)[valid], expected))
        chosen.append(differing(np.asarray(out["expert_index"][i])[..., 0].reshape(-1)[valid], expected.argmax(-1)))
        kept = (z[name + "gate"][valid] > 0).sum() / (valid.sum() * converted.config.moe.top_k)
        drops.append(abs(float(out["dropped"][i]) - (1 - kept)))
    if logits:
        yield Row(mode + "router logits", max(logits))
        yield Row(mode + "chosen experts (share that differs)", max(chosen), 0.0)
        yield Row(mode + "dropped share (difference)", max(drops), 1e-6)


def check_segmentation(converted: Converted, z: Arrays, loss: LossConfig, train: bool) -> Iterator[Row]:
    """Masks, every loss term and gradients."""
    batch, rows = seg_rows(converted.batch(z), converted.seg_id, z)
    kind = "uniform" if converted.config.moe.top_k == 1 else "gumbel"
    noise = router_noise(z, kind, converted.config.moe_layers)
    embedding = image_embedding(converted, batch) if "images" in z else jnp.moveaxis(z["image_embeddings"], 1, -1)
    if "images" in z and "image_embeddings" in z:
        yield Row("SAM image embedding", relative(embedding, z["image_embeddings"].transpose(0, 2, 3, 1)))
    (terms, output, out), gradients = jax.jit(loss_and_gradients(converted, loss, train))(
        converted.params, batch, noise, embedding, rows
    )
    yield from _check_spliced(z, batch, out)
    yield from check_router(converted, z, batch, out, "", "")
    yield from check_masks(z, batch, output, out)
    terms["language"] = language_loss(converted, terms)
    for name, theirs in LOSS_NAMES.items():
        yield Row("loss terms", relative(terms[name], z["loss." + theirs]))
    yield Row("loss terms", relative(terms["loss"], z["loss.loss"]))
    places = converted.places()
    for key in z:
        if key.startswith("grad.") and not ALWAYS_ZERO.search(key):
            yield Row(
                "gradients", relative(as_torch(gradients, places, key.removeprefix("grad.")), z[key]), GRADIENT_BAR
            )


def language_loss(converted: Converted, terms):
    """What the original calls ce_loss: with the routers' auxiliary loss."""
    return terms["ce"] + converted.config.moe.aux_loss_weight * terms["aux"]


def loss_and_gradients(converted: Converted, loss: LossConfig, train: bool) -> Callable:
    model = converted.model()

    def compute(params, batch, noise, embedding, rows):
        output, out = forward(bind(model, params), batch, train, noise, embedding, rows)
        total, terms = total_loss(
            output, params["llm"]["head"]["kernel"], batch, loss, converted.config, divisors(batch)
        )
        return total, (terms, output, out)

    def run(params, batch, noise, embedding, rows):
        (_, rest), gradients = jax.value_and_grad(compute, has_aux=True)(params, batch, noise, embedding, rows)
        return rest, gradients

    return run


def check_masks(z: Arrays, batch: Batch, output, out) -> Iterator[Row]:
    """The masks that were recorded, if any."""
    canvas = batch.gt_masks.shape[-2:]
    logits, _ = resample_to_canvas(
        output.mask_logits, batch.sam_box, batch.mask_size, canvas=canvas, sam_size=SAM_SIDE, mode="reference"
    )
    recorded = [
        (i, row, slot) for i, (row, slot) in enumerate(np.argwhere(batch.mask_valid)) if f"low_res_mask_{i}" in z
    ]
    for i, row, slot in recorded:
        rows, columns = batch.mask_size[row]
        yield Row("<SEG> embedding", relative(out["seg_embedding"][row, slot], z[f"seg_embedding_{i}"][0, 0]))
        yield Row("mask logits", at_steps(output.mask_logits[row, slot], z[f"low_res_mask_{i}"][0, 0]))
        yield Row("masks at original size", at_steps(logits[row, slot, :rows, :columns], z[f"pred_mask_{i}"][0, 0]))
    if recorded:  # all of a batch at once: a single one may be as near to 0 as float32 errs
        found = [output.predicted_iou[row, slot] for _, row, slot in recorded]
        yield Row("predicted IoU", relative(found, [z[f"iou_{i}"][0, 0] for i, _, _ in recorded]))


def prompt(z: Arrays, prefix: str, ids: str = "input_ids") -> dict[str, np.ndarray]:
    """A recorded prompt under a prefix, with the names that `golden_batch` knows."""
    found = {"input_ids": z[prefix + ids], "images_clip": z.get(prefix + "images_clip", z.get("images_clip"))}
    found["attention_mask"] = np.ones_like(found["input_ids"])
    images = z.get(prefix + "images", z.get("images"))
    found |= {} if images is None else {"images": images}
    mask = z.get("region_mask" if prefix == "region_" else prefix + "region_mask") if prefix else None
    return found if mask is None else found | {"region_mask_0": mask, "valid_region": np.ones(1, bool)}


def check_gradient_norms(converted: Converted, z: Arrays, stats: Mapping[str, list[float]]) -> Iterator[Row]:
    """Length and sum of every trainable tensor's gradient."""
    (batch, rows), noise = (
        seg_rows(converted.batch(z), converted.seg_id, z),
        router_noise(z, "uniform", converted.config.moe_layers),
    )
    run = jax.jit(loss_and_gradients(converted, STAGE4_LOSS, True))
    _, gradients = run(converted.params, batch, noise, image_embedding(converted, batch), rows)
    places = converted.places()
    for key, recorded in stats.items():
        if recorded is not None and not ALWAYS_ZERO.search(key):
            norm, total = recorded
            gradient = as_torch(gradients, places, key).astype(np.float64)
            yield Row("length and sum of all gradients", abs(np.linalg.norm(gradient) - norm) / norm, GRADIENT_BAR)
            yield Row(
                "length and sum of all gradients",
                abs(gradient.sum() - total) / (norm * gradient.size**0.5),
                GRADIENT_BAR,
            )


def check_optimizer(converted: Converted, z: Arrays, case: Mapping, final: Arrays) -> Iterator[Row]:
    """Six steps of AdamW on one batch: losses and gradient norms on the way, parameters at the end."""
    places = converted.places()
    trainable_paths = {places[mapping.canonical(key)].path for key in case["trainable"]}
    pattern = "|".join(f"^{re.escape(path)}$" for path in sorted(trainable_paths))
    trainable, frozen = partition(jax.tree.map(jnp.asarray, converted.params), (pattern,))
    optim = OptimConfig(lr=case["lr"], warmup=0.25, schedule="reference")
    tx, schedule = make_optimizer(optim, trainable), make_schedule(optim, total_steps=12, epoch_steps=12)
    (batch, rows), state = seg_rows(converted.batch(z), converted.seg_id, z), tx.init(trainable)
    run, embedding = loss_and_gradients(converted, STAGE4_LOSS, True), image_embedding(converted, batch)

    @jax.jit
    def step(trainable, state, noise, rate):
        (terms, _, _), gradients = run(combine(trainable, frozen), batch, noise, embedding, rows)
        gradients, _ = partition(gradients, (pattern,))
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
        updates, state = tx.update(gradients, state, trainable, rate=rate)
        return jax.tree.map(jnp.add, trainable, updates), state, terms, norm

    tokens = batch.tokens.size
    for i, expected in enumerate(case["trajectory"]):
        layers = converted.config.moe_layers
        noise = np.stack(
            [
                np.random.RandomState(1000 * (800 + i) + 7 * layer + 1).random_sample((tokens, 2)).astype(np.float32)
                for layer in layers
            ]
        )
        trainable, state, terms, norm = step(trainable, state, noise, schedule(i))
        yield Row("losses of six steps", relative(terms["loss"], expected["loss"]))
        yield Row("losses of six steps", relative(language_loss(converted, terms), expected["ce_loss"]))
        yield Row("gradient norms of six steps", relative(norm, expected["grad_norm_before_clip"]), GRADIENT_BAR)
    for key in final:
        if not ALWAYS_ZERO.search(key):
            yield Row(
                "parameters after six steps", relative(as_torch(combine(trainable, frozen), places, key), final[key])
            )


def check_carried(sources: tuple[pathlib.Path, ...], extra: pathlib.Path) -> Iterator[Row]:
    """Tensors of a source of their own: into the model, and back again unchanged."""
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        from_torch.convert(from_torch.Options((*sources, extra), work / "converted"))
        to_torch.convert(work / "converted", work / "back")
        back = torch_files.read_folder(work / "back")
        for key, tensor in torch_files.read_file(extra).items():
            yield Row(
                "tensors that come back (share that differs)",
                differing(back[mapping.canonical(key)].read(), tensor.read()),
                0.0,
            )


def summarise(rows: Iterator[Row]) -> list[Row]:
    """The worst of each kind."""
    worst: dict[str, Row] = {}
    for row in rows:
        if row.what not in worst or not row.error <= worst[row.what].error:
            worst[row.what] = row
    return list(worst.values())
