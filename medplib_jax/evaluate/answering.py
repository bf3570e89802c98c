"""Answers to the records of one cell: prompts in groups of one length, decoded in slots, each answer a line of
predictions.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from medplib_jax.batch import Batch, Params
from medplib_jax.config.experiment import ExperimentConfig, ShardingConfig
from medplib_jax.config.model import LoraConfig
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.data.errors import DataError
from medplib_jax.data.pipeline import Loader, eval_batches
from medplib_jax.data.tokenizers import AnyTokenizer, load_tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.loading import load_checkpoint
from medplib_jax.decode.masks import mask_drawer
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.decode.stream import lanes_for, stream_answers
from medplib_jax.evaluate.checkpoints import SweepCheckpoint
from medplib_jax.evaluate.evaluators.common import Evaluator
from medplib_jax.evaluate.evaluators.predictions import SKIPPED, PredictionRow, Shard
from medplib_jax.evaluate.evaluators.reference import ReferenceLoader
from medplib_jax.evaluate.kinds import find_kind
from medplib_jax.evaluate.plan import AnswerSettings, PlannedCell, slots_of
from medplib_jax.evaluate.tasks import SweepTask
from medplib_jax.parallel.compilation import compiling_shown
from medplib_jax.parallel.processes import wait_for_others


class AskedModel:
    """A model's parameters on this process's devices, as `to_decoding_layout` returns them, and its generators."""

    def __init__(
        self,
        experiment: ExperimentConfig,
        params: Params,
        tokenizer: AnyTokenizer,
        mesh: Mesh,
        rules: ShardingConfig,
        quantize: str = "",
    ):
        self.experiment = dataclasses.replace(
            experiment, model=dataclasses.replace(experiment.model, lora=LoraConfig())
        )
        self.params = params
        self.tokenizer, self.quantize = tokenizer, quantize
        self._mesh, self._rules = mesh, rules
        self._generators: dict[tuple, Generator] = {}

    def replace_params(self, params: Params) -> None:
        """Other parameters of the same model; nothing is compiled anew."""
        self.params = params
        for generator in self._generators.values():
            generator.params = params

    def generator(self, options: DecodeOptions, stop_ids: tuple[int, ...]) -> Generator:
        """The same one for the same arguments, because each compiles its own programs."""
        key = (options, stop_ids)
        if key not in self._generators:
            self._generators[key] = Generator(
                self.experiment.model,
                self.params,
                options,
                stop_ids=stop_ids,
                seg_id=self.tokenizer.seg_id,
                mesh=self._mesh,
                rules=self._rules,
            )
        return self._generators[key]


def load_model(
    checkpoint: SweepCheckpoint, experiment: ExperimentConfig, mesh: Mesh, rules: ShardingConfig
) -> AskedModel:
    """A checkpoint of a sweep on the mesh of this process's devices."""
    wait_for_others(f"load/{checkpoint.name}")
    loaded = load_checkpoint(checkpoint.workdir, checkpoint.step, mesh=mesh, rules=rules, quantize=checkpoint.quantize)
    return AskedModel(experiment, loaded.params, load_tokenizer(loaded.tokenizer), mesh, rules, loaded.quantize)


def answer_cell(cell: PlannedCell, model: AskedModel, workdir: Path, turn: int, config: SweepConfig) -> None:
    """Writes the lines of this process's shards.

    `turn` says which process takes the first one. RuntimeError when a record got no line.
    """
    own = [
        shard
        for i, shard in enumerate(cell.shards().items())
        if (turn + i) % jax.process_count() == jax.process_index()
    ]
    shards = [Shard(workdir / path, cell.header, records) for path, records in own]
    shard_of = {record: shard for shard in shards for record in shard.missing}
    total = sum(len(records) for _, records in own)
    initial, hidden = total - len(shard_of), jax.process_index() > 0
    bar = tqdm(total=total, initial=initial, desc=str(cell), unit="record", disable=hidden)
    with bar as progress, compiling_shown(bar):
        for line in answers(cell.task, cell.settings, model, sorted(shard_of), config):
            shard_of[line["record"]].add(line)
            progress.update()
    forgotten = sorted(record for shard in shards for record in shard.missing)
    if forgotten:
        raise RuntimeError(f"{cell}: {len(forgotten)} records got no answer, first record {forgotten[0]}")


def answers(
    task: SweepTask, settings: AnswerSettings, asked: AskedModel, records: Sequence[int], config: SweepConfig
) -> Iterator[PredictionRow]:
    """One line per record, as the answers come."""
    model = asked.experiment.model
    kind = find_kind(task.kind, task.config.part)
    is_reference, has_masks = settings.protocol == "reference", kind.draws_masks
    data = dataclasses.replace(
        asked.experiment.data,
        template=settings.template,
        bucket_lengths=evenly_spaced_lengths(model.llm.max_positions),
        on_error=config.on_error,
        max_images=max(task.images + task.examples * model.icl.pictures, 1),
        max_regions=task.regions,
        max_masks=task.masks,
    )
    reads_as_original = is_reference and model.draws_masks
    loader = (ReferenceLoader if reads_as_original else Loader)([task.source], asked.tokenizer, data, model)
    draw = None
    if has_masks:
        draw = mask_drawer(model.mask.image_size, settings.unpad, data.mask_canvas, settings.mask_threshold)
    evaluator = Evaluator(kind, loader, protocol=settings.protocol, draw_masks=draw)
    # one mask more than any answer should have, so that a mask too many is drawn and counted
    drawn = (1 if is_reference else task.masks + 1) if has_masks else 0
    options = DecodeOptions(
        settings.max_new_tokens, drawn, original_masks=is_reference and has_masks, quantize=asked.quantize
    )
    generator = asked.generator(options, loader.stop_ids)
    slots, refill = slots_of(config, asked.experiment)
    lanes = lanes_for(asked.params, slots)
    by_length, failed = group_by_length(loader, task, records, data.bucket_lengths, config.on_error)
    for length in sorted(by_length):
        batches = eval_batches(loader, by_length[length], refill, range(refill), question=True, workers=0)
        prompts = _prompts(batches, failed)
        for prompt, generation in stream_answers(generator, prompts, slots=slots, refill=refill, lanes=lanes):
            try:
                yield evaluator.row(prompt, generation)
            except DataError as error:
                if config.on_error == "raise":
                    raise
                failed[int(prompt.record[0])] = error
    yield from ({"record": record, SKIPPED: error.as_dict()} for record, error in failed.items())


def _prompts(batches: Iterable[tuple[dict, list[DataError]]], failed: dict[int, DataError]) -> Iterator[Batch]:
    for arrays, errors in batches:
        failed.update({error.record: error for error in errors if error.record is not None})
        yield Batch(**arrays)


def group_by_length(
    loader: Loader, task: SweepTask, records: Sequence[int], lengths: Sequence[int], on_error: str
) -> tuple[dict[int, list[int]], dict[int, DataError]]:
    """Records by the length that their prompt is padded to, which depends on nothing else, and those that cannot be
    asked.
    """
    groups: dict[int, list[int]] = {}
    failed = {record: task.skipped[record] for record in records if record in task.skipped}
    for record in records:
        if record in failed:
            continue
        try:
            length = len(loader.encode(loader.record(record), question=True))
            groups.setdefault(next(padded for padded in lengths if padded >= length), []).append(record)
        except DataError as error:
            if on_error == "raise":
                raise
            failed[record] = error
    return groups, failed


def evenly_spaced_lengths(longest: int) -> tuple[int, ...]:
    """What prompts are padded to: about 32 lengths, so that little is computed for nothing and few programs are
    compiled. The last is `longest`.
    """
    step = max(32, longest // 32)
    return (*range(step, longest, step), longest)
