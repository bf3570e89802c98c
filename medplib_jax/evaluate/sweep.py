"""The engine of evaluation: checkpoints x tasks x protocols, each cut into shards of records that all processes share out.

A process holds the model on its own devices and takes whole shards, so that nothing is exchanged while answers are made, and a record's
line is the same whoever makes it. `<workdir>/predictions/<checkpoint>/<protocol>/<task>.<shard>.jsonl` holds the lines; what has a line is
not asked again. When all are there, captions are scored by SPICE (`evaluators/spice.py`), and process 0 reads everything and writes `<workdir>/sweep.json`
with the metrics.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from medplib_jax.batch import Batch, Params
from medplib_jax.checkpoint import load_params
from medplib_jax.config.experiment import ExperimentConfig, ShardingConfig
from medplib_jax.config.model import LoraConfig
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.data.errors import DataError
from medplib_jax.data.pipeline import Loader, eval_batches
from medplib_jax.data.tokenizers import load_tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.layout import lay_out
from medplib_jax.decode.masks import mask_drawer
from medplib_jax.decode.stream import lanes_for, stream_answers
from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.checkpoints import Checkpoint, find_checkpoints
from medplib_jax.evaluate.evaluators import refer_box, reference, router, spice
from medplib_jax.evaluate.evaluators.common import Evaluator
from medplib_jax.evaluate.evaluators.grounding import GroundingEvaluator
from medplib_jax.evaluate.evaluators.predictions import SKIPPED, Shard, read_lines
from medplib_jax.evaluate.evaluators.reference import ReferenceLoader
from medplib_jax.evaluate.evaluators.region import RegionVqaEvaluator
from medplib_jax.evaluate.evaluators.vqa import VqaEvaluator
from medplib_jax.evaluate.tasks import Task, find_tasks
from medplib_jax.models.layers import model_shardings
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.processes import of_every_process, require_shared, wait_for_others
from medplib_jax.train.step import abstract_model

log = logging.getLogger(__name__)

EVALUATORS: dict[str, type[Evaluator]] = {
    "grounding": GroundingEvaluator,
    "region": RegionVqaEvaluator,
    "vqa": VqaEvaluator,
}
EVALUATORS |= refer_box.PARTS
RESULT = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers of one checkpoint are made in one protocol."""

    protocol: str
    template: str
    unpad: str
    max_new_tokens: int
    mask_threshold: float

    @classmethod
    def of(cls, config: SweepConfig, experiment: ExperimentConfig, protocol: str) -> "Settings":
        max_new_tokens = config.max_new_tokens or experiment.eval.max_new_tokens
        if protocol == "reference" and not experiment.model.draws_masks:
            return cls(
                protocol, reference.TEMPLATE_WITH_BOXES, reference.UNPAD, max_new_tokens, reference.MASK_THRESHOLD
            )
        if protocol == "reference":
            return cls(protocol, reference.TEMPLATE, reference.UNPAD, max_new_tokens, reference.MASK_THRESHOLD)
        threshold = config.mask_threshold or experiment.eval.mask_threshold
        return cls(protocol, experiment.data.template, experiment.model.mask.unpad, max_new_tokens, threshold)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One task put to one checkpoint in one protocol."""

    checkpoint: Checkpoint
    task: Task
    settings: Settings
    shard_size: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.checkpoint.name, self.task.name, self.settings.protocol

    @property
    def header(self) -> dict:
        made_from = {
            "task": self.task.name,
            "kind": self.task.kind,
            "data": self.task.digest,
            "checkpoint": self.checkpoint.name,
        }
        made_from |= {"step": self.checkpoint.step, "written": self.checkpoint.written, "shard": self.shard_size}
        quantize = {"quantize": self.checkpoint.quantize} if self.checkpoint.quantize else {}
        return made_from | quantize | dataclasses.asdict(self.settings)

    def folder(self) -> Path:
        return Path("predictions", self.checkpoint.name, self.settings.protocol)

    def shards(self) -> dict[Path, tuple[int, ...]]:
        """{path below the workdir: its records}."""
        shards: dict[Path, list[int]] = {}
        for record in self.task.records:
            shards.setdefault(self.folder() / f"{self.task.name}.{record // self.shard_size:05d}.jsonl", []).append(
                record
            )
        return {path: tuple(records) for path, records in shards.items()}

    @property
    def spice_file(self) -> Path | None:
        """Where SPICE of its captions stands, below the workdir; None for other tasks."""
        return self.folder() / f"{self.task.name}.spice.jsonl" if self.task.config.part == spice.PART else None

    def lines(self, workdir: Path) -> list[dict] | None:
        """What the files say of each record, in their order; None while a record has no line."""
        lines = [line for path in self.shards() for line in read_lines(workdir / path, self.header)]
        by_record = {line["record"]: line for line in lines}
        return (
            [by_record[record] for record in self.task.records] if by_record.keys() >= set(self.task.records) else None
        )


class LoadedModel:
    """A checkpoint's parameters on this process's devices, with adapters merged, and its generators."""

    def __init__(self, checkpoint: Checkpoint, experiment: ExperimentConfig, mesh: Mesh, rules: ShardingConfig):
        shardings = model_shardings(abstract_model(experiment.model, rules), mesh)
        wait_for_others(f"load/{checkpoint.name}")
        _, params, tokenizer = load_params(checkpoint.workdir, checkpoint.step, shardings)
        self.experiment = dataclasses.replace(
            experiment, model=dataclasses.replace(experiment.model, lora=LoraConfig())
        )
        self.params: Params = lay_out(experiment.model, params, mesh, rules, checkpoint.quantize)
        self._quantize, self._rules = checkpoint.quantize, rules
        self.tokenizer, self.mesh = load_tokenizer(tokenizer), mesh
        self._generators: dict[tuple, Generator] = {}

    def generator(
        self, max_new_tokens: int, max_masks: int, original_masks: bool, stop_ids: tuple[int, ...]
    ) -> Generator:
        """The same one for the same arguments, because each compiles its own programs."""
        key = (max_new_tokens, max_masks, original_masks, stop_ids)
        if key not in self._generators:
            self._generators[key] = Generator(
                self.experiment.model,
                self.params,
                stop_ids=stop_ids,
                seg_id=self.tokenizer.seg_id,
                max_new_tokens=max_new_tokens,
                max_masks=max_masks,
                original_masks=original_masks,
                mesh=self.mesh,
                rules=self._rules,
                quantize=self._quantize,
            )
        return self._generators[key]


def run_sweep(config: SweepConfig, workdir: str | os.PathLike) -> dict:
    """Answers what has no line yet and returns what `sweep.json` holds (in process 0); cells of earlier calls in the same workdir stay in it.

    {"baseline", "checkpoints": [{"name", "path", "run", "step", "kind", "quantize"}], "tasks": [{"name", "kind", "part", "file", "root", "records", "source"}],
    "cells": [{"checkpoint", "task", "protocol", "max_new_tokens", "mask_threshold", "predictions", "records", "skipped", "left_out", "metrics", "router"}]}

    left_out: metric -> why it was not computed.

    Raises FileNotFoundError for checkpoints that are not there, ValueError for tasks that are not or for predictions that were made from
    something else under the same names or a workdir that not all processes see, DataError for a bad record unless `on_error` is skip.
    """
    workdir = Path(workdir).absolute()
    require_shared(workdir)
    found = find_checkpoints(config.checkpoints, config.steps, workdir / "converted", config.quantize)
    tasks = find_tasks(config.selected, config.limit, config.on_error, config.missing)
    experiments = {checkpoint.name: checkpoint.experiment() for checkpoint in found}
    cells = [
        Cell(checkpoint, task, Settings.of(config, experiments[checkpoint.name], protocol), config.shard)
        for checkpoint in found
        for task in tasks
        for protocol in config.protocols
    ]
    unfinished = {cell.checkpoint.name for cell in cells if cell.lines(workdir) is None}
    wait_for_others("planned")  # nobody writes before all have seen what is there
    result = Result(workdir, config.baseline, cells, experiments)
    mesh = make_mesh(config.mesh, jax.local_devices())
    for checkpoint in found:
        loaded = None  # two may not fit
        if checkpoint.name in unfinished:
            loaded = LoadedModel(checkpoint, experiments[checkpoint.name], mesh, config.sharding)
        for turn, cell in enumerate(cells):
            if cell.checkpoint == checkpoint:
                if loaded:
                    answer_cell(cell, loaded, workdir, turn, config)
                if not cell.spice_file:
                    result.add(cell)
    wait_for_others("answered")
    why_not = next(filter(None, of_every_process("captions", score_captions(cells, workdir))), "")
    if why_not and jax.process_index() == 0:
        log.warning("SPICE is left out: %s", why_not)
    for cell in cells:  # to which others have contributed since
        result.add(cell, why_not)
    return result.content


def answer_cell(cell: Cell, loaded: LoadedModel, workdir: Path, turn: int, config: SweepConfig) -> None:
    """Writes the lines of this process's shards. `turn` says who takes the first one."""
    own = [
        shard
        for i, shard in enumerate(cell.shards().items())
        if (turn + i) % jax.process_count() == jax.process_index()
    ]
    shards = [Shard(workdir / path, cell.header, records) for path, records in own]
    shard_of = {record: shard for shard in shards for record in shard.missing}
    title = f"{cell.checkpoint.name} {cell.task.name} {cell.settings.protocol}"
    total = sum(len(records) for _, records in own)
    with tqdm(
        total=total, initial=total - len(shard_of), desc=title, unit="record", disable=jax.process_index() > 0
    ) as progress:
        for line in _lines(cell, loaded, sorted(shard_of), config):
            shard_of[line["record"]].add(line)
            progress.update()


def score_captions(cells: Sequence[Cell], workdir: Path) -> str:
    """SPICE of this process's share of the cells with captions, as far as they are answered; returns why it cannot run, "" if it can."""
    captioned = [cell for cell in cells if cell.spice_file]
    for cell in captioned[jax.process_index() :: jax.process_count()]:
        answered = [line for line in cell.lines(workdir) or () if SKIPPED not in line]
        try:
            spice.write_spice(workdir / cell.spice_file, cell.header, answered)
        except metrics.MissingExtra as error:
            return str(error)
    return ""


def _lines(cell: Cell, loaded: LoadedModel, records: Sequence[int], config: SweepConfig) -> Iterator[dict]:
    """One line per record, as the answers come."""
    task, settings, model = cell.task, cell.settings, loaded.experiment.model
    is_reference, has_masks = settings.protocol == "reference", task.kind == "grounding"
    data = dataclasses.replace(
        loaded.experiment.data,
        template=settings.template,
        bucket_lengths=prompt_lengths(model.llm.max_positions),
        on_error=config.on_error,
        max_images=max(task.images, 1),
        max_regions=task.regions,
        max_masks=task.masks,
    )
    reads_as_original = is_reference and model.draws_masks
    loader = (ReferenceLoader if reads_as_original else Loader)([task.source], loaded.tokenizer, data, model)
    draw = (
        mask_drawer(model.mask.image_size, settings.unpad, data.mask_canvas, settings.mask_threshold)
        if has_masks
        else None
    )
    evaluator = EVALUATORS[task.config.part or task.kind](loader, protocol=settings.protocol, draw_masks=draw)
    # one mask more than any answer should have, so that a mask too many is drawn and counted
    drawn = (1 if is_reference else task.masks + 1) if has_masks else 0
    generator = loaded.generator(settings.max_new_tokens, drawn, is_reference and has_masks, loader.stop_ids)
    slots = config.slots or loaded.experiment.eval.batch_size
    refill, lanes = config.refill or max(1, slots // 2), lanes_for(loaded.params, slots)
    by_length, failed = group_by_length(loader, task, records, data.bucket_lengths, config.on_error)
    for length in sorted(by_length):
        batches = eval_batches(loader, by_length[length], refill, range(refill), question=True, workers=0)
        for prompt, generation in stream_answers(
            generator, _prompts(batches, failed), slots=slots, refill=refill, lanes=lanes
        ):
            try:
                yield evaluator.row(prompt, generation)
            except DataError as error:
                if config.on_error == "raise":
                    raise
                failed[int(prompt.record[0])] = error
    yield from ({"record": record, SKIPPED: error.as_dict()} for record, error in failed.items())


def _prompts(batches: Iterable[tuple[dict, list[DataError]]], failed: dict[int, DataError]) -> Iterator[Batch]:
    for arrays, errors in batches:
        failed.update({error.record: error for error in errors})
        yield Batch(**arrays)


def group_by_length(
    loader: Loader, task: Task, records: Sequence[int], lengths: Sequence[int], on_error: str
) -> tuple[dict[int, list[int]], dict[int, DataError]]:
    """Records by the length that their prompt is padded to, which depends on nothing else, and those that cannot be asked."""
    groups: dict[int, list[int]] = {}
    failed = {record: task.skipped[record] for record in records if record in task.skipped}
    for record in records:
        if record in failed:
            continue
        try:
            length = len(loader.encode(loader.record(record), question=True))
            groups.setdefault(int(lengths[np.searchsorted(lengths, length)]), []).append(record)
        except DataError as error:
            if on_error == "raise":
                raise
            failed[record] = error
    return groups, failed


def prompt_lengths(longest: int) -> tuple[int, ...]:
    """What prompts are padded to: about 32 lengths, so that little is computed for nothing and few programs are compiled."""
    step = max(32, longest // 32)
    return tuple(range(step, longest + 1, step))


class Result:
    """sweep.json: read from earlier calls, extended cell by cell; in the end in the order of `cells` whoever finished first."""

    def __init__(self, workdir: Path, baseline: str, cells: Sequence[Cell], experiments: dict[str, ExperimentConfig]):
        self._path, self._workdir, self._experiments = workdir / RESULT, workdir, experiments
        before = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._parts = {
            part: {_key(entry): entry for entry in before.get(part, [])} for part in ("checkpoints", "tasks", "cells")
        }
        self._planned = {
            "checkpoints": dict.fromkeys((cell.checkpoint.name,) for cell in cells),
            "tasks": dict.fromkeys((cell.task.name,) for cell in cells),
            "cells": dict.fromkeys(cell.key for cell in cells),
        }
        self._baseline = baseline or before.get("baseline")
        self._added: set[tuple] = set()
        names = [name for (name,) in self._parts["checkpoints"] | self._planned["checkpoints"]]
        if baseline and baseline not in names:
            raise ValueError(f"baseline {baseline!r} is not one of the checkpoints {names}")

    @property
    def content(self) -> dict:
        ordered = {}
        for part, entries in self._parts.items():
            earlier = [entry for key, entry in entries.items() if key not in self._planned[part]]
            ordered[part] = earlier + [entries[key] for key in self._planned[part] if key in entries]
        answered = (self._baseline,) in self._parts["checkpoints"]
        return {"baseline": self._baseline if answered else None} | ordered

    def add(self, cell: Cell, why_no_spice: str = "") -> None:
        """The metrics of a cell, if all its lines are there; the work of process 0."""
        if jax.process_index() > 0 or cell.key in self._added or (lines := cell.lines(self._workdir)) is None:
            return
        self._added.add(cell.key)
        rows, files, left_out = [line for line in lines if SKIPPED not in line], list(cell.shards()), {}
        if cell.spice_file and rows:
            scored = spice.with_spice(self._workdir / cell.spice_file, cell.header, rows)
            rows, files, left_out = (
                (rows, files, {"spice": why_no_spice}) if scored is None else (scored, [*files, cell.spice_file], {})
            )
        model = self._experiments[cell.checkpoint.name].model
        modalities = [row["modality"] for row in rows]
        entry = {
            "checkpoint": cell.checkpoint.name,
            "task": cell.task.name,
            "protocol": cell.settings.protocol,
            "max_new_tokens": cell.settings.max_new_tokens,
            "mask_threshold": cell.settings.mask_threshold,
            "predictions": [str(path) for path in files],
            "records": len(rows),
            "skipped": [line[SKIPPED] for line in lines if SKIPPED in line],
            "left_out": left_out,
            "metrics": metrics.by_modality(metrics.statistics(rows, cell.settings.protocol), modalities)
            if rows
            else {},
            "router": router.summarise(rows, model) if model.moe_layers and rows else None,
        }
        for part, new in (("checkpoints", cell.checkpoint.as_dict()), ("tasks", cell.task.as_dict()), ("cells", entry)):
            self._parts[part][_key(new)] = new
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self._path)


def _key(entry: dict) -> tuple:
    return (entry["name"],) if "name" in entry else (entry["checkpoint"], entry["task"], entry["protocol"])
