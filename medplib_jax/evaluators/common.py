"""What every evaluator does: generate answers batch by batch, score each record, keep one line per record on disk, sum up at the end."""

import abc
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from medplib_jax import metrics
from medplib_jax.data.errors import DataError
from medplib_jax.data.pipeline import Loader, eval_batches
from medplib_jax.data.tokenizer import Tokenizer
from medplib_jax.decode import Generation
from medplib_jax.models.unpad import resample_to_canvas
from medplib_jax.types import Batch

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated answer beside the expected one. Masks are bool [height, width] of the picture (shrunk, if it exceeds the mask canvas)."""

    text: str
    expected: str
    answer_type: str
    masks: tuple[np.ndarray, ...] = ()
    true_masks: tuple[np.ndarray, ...] = ()


class Evaluator(abc.ABC):
    """Runs the questions of one annotation file. Subclasses say how one answer is scored and how scores are summed up.

    Lines go to `<out_dir>/<name>.jsonl`; records that are there already are not generated again. `draw_masks` (see `mask_drawer`) is for
    questions with masks. `probe`, when given, maps (prompts, generation) to one JSON-able value per row, kept under "router".
    """

    def __init__(
        self,
        name: str,
        loader: Loader,
        tokenizer: Tokenizer,
        indices: Sequence[int],
        out_dir: str | os.PathLike,
        header: dict[str, Any],
        *,
        batch_size: int,
        draw_masks: Callable[[Batch, Generation], np.ndarray] | None = None,
        protocol: str = "exact",
        probe: Callable[[Batch, Generation], list] | None = None,
    ):
        metrics.check_protocol(protocol)
        self.name, self.protocol = name, protocol
        self.predictions = Predictions(Path(out_dir) / f"{name}.jsonl", header)
        self.skipped: list[DataError] = []
        self._loader, self._tokenizer, self._indices, self._batch_size = loader, tokenizer, indices, batch_size
        self._draw_masks, self._probe = draw_masks, probe

    @abc.abstractmethod
    def score(self, answer: Answer) -> dict[str, float]:
        """The scores of one answer."""

    @abc.abstractmethod
    def summarise(self, rows: Sequence[Row]) -> dict[str, float]:
        """Metrics over rows, each of which has its scores under "scores"."""

    def run(self, generator: Callable[[Batch], Generation]) -> Iterator[tuple[str, float]]:
        """Answers what has no line yet, then yields (metric, value): over all records, as `metric/<modality>`, and as the mean of those."""
        missing = [index for index in self._indices if index not in self.predictions.rows]
        batches = eval_batches(self._loader, missing, self._batch_size, range(self._batch_size), question=True, workers=0)
        with tqdm(total=len(self._indices), initial=len(self._indices) - len(missing), desc=self.name, unit="record") as progress:
            for arrays, errors in batches:
                batch = Batch(**arrays)
                self.predictions.add(self._rows(batch, jax.device_get(generator(batch))))
                self.skipped += errors
                progress.update(int((batch.record >= 0).sum()) + len(errors))
        rows = self.rows()
        overall = self.summarise(rows)
        yield from overall.items()
        modalities = sorted({row["modality"] for row in rows})
        each = {modality: self.summarise([row for row in rows if row["modality"] == modality]) for modality in modalities}
        for metric in overall:
            values = {modality: summary[metric] for modality, summary in each.items() if metric in summary}
            for modality, value in values.items():
                yield f"{metric}/{modality or 'none'}", value
            yield f"{metric}/modality_mean", float(np.mean(list(values.values())))

    def rows(self) -> list[Row]:
        """The lines of the records that were asked for, in their order."""
        return [self.predictions.rows[index] for index in self._indices if index in self.predictions.rows]

    def _rows(self, batch: Batch, generation: Generation) -> Iterator[Row]:
        masks_BxMxIxJ = None if self._draw_masks is None else self._draw_masks(batch, generation)
        probed = None if self._probe is None else self._probe(batch, generation)
        for i in np.flatnonzero(batch.record >= 0):
            record = self._loader.record(int(batch.record[i]))
            masks = true_masks = ()
            if masks_BxMxIxJ is not None:
                height, width = batch.mask_size[i]
                masks = tuple(masks_BxMxIxJ[i, generation.mask_valid[i], :height, :width])
                true_masks = tuple(batch.gt_masks[i, batch.mask_valid[i], :height, :width] > 0)
            text = self._tokenizer.decode(generation.tokens[i, : generation.lengths[i]]).strip()
            answer = Answer(text, self._loader.encode(record, question=True).answer.strip(), record.answer_type, masks, true_masks)
            row = {
                "record": record.index,
                "image": list(record.images),
                "modality": record.modality,
                "question": record.turns[-2][1],
                "answer": answer.text,
                "expected": answer.expected,
                "answer_type": record.answer_type,
                "scores": self.score(answer),
            }
            if masks_BxMxIxJ is not None:
                row["masks"] = [encode_rle(mask) for mask in masks]
                row["true_masks"] = [encode_rle(mask) for mask in true_masks]
                row["predicted_iou"] = generation.predicted_iou[i, generation.mask_valid[i]].tolist()
            if probed is not None:
                row["router"] = probed[i]
            yield row


def mask_drawer(sam_size: int, unpad: str, canvas: int, threshold: float) -> Callable[[Batch, Generation], np.ndarray]:
    """A function of prompts and generation: bool masks [B, M, canvas, canvas] of probability over `threshold`, picture at the top left."""

    @jax.jit
    def logits_on_canvas(mask_logits, sam_box, mask_size):
        return resample_to_canvas(mask_logits, sam_box, mask_size, canvas=(canvas, canvas), sam_size=sam_size, mode=unpad)[0]

    def draw(prompts: Batch, generation: Generation) -> np.ndarray:
        return metrics.binarise(np.asarray(logits_on_canvas(generation.mask_logits, prompts.sam_box, prompts.mask_size)), threshold)

    return draw


class Predictions:
    """A JSON-lines file with a header line and one line per record, which a killed run continues.

    The header says what the lines were made from (task, data, checkpoint, settings). Opening a file with another header is a ValueError,
    so that lines of two checkpoints never mix. A last line that was cut off by a kill is dropped.
    """

    def __init__(self, path: str | os.PathLike, header: dict[str, Any]):
        self.path = Path(path)
        self.rows: dict[int, Row] = {}
        header = json.loads(json.dumps(header))
        lines = self._whole_lines()
        if lines and lines[0] != header:
            differing = ", ".join(sorted(key for key in {*lines[0], *header} if lines[0].get(key) != header.get(key)))
            raise ValueError(f"{self.path}: predictions of another run (different {differing}); expected {header}, found {lines[0]}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = {row["record"]: row for row in lines[1:]}
        if not lines:
            self._append([header])

    def add(self, rows: Iterable[Row]) -> None:
        """Writes the rows and flushes them to disk; each has its record's index under `record`."""
        rows = list(rows)
        self._append(rows)
        self.rows |= {row["record"]: row for row in rows}

    def _append(self, lines: Iterable[dict]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[dict]:
        """The parsed lines; cuts a half line off the file."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self.path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]


def encode_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Boolean mask [I, J] as uncompressed COCO run lengths: {"size": [I, J], "counts": [zeros, ones, zeros, ...]}, column by column."""
    flat = mask.astype(bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=flat.size).tolist()}


def decode_rle(rle: dict[str, list[int]]) -> np.ndarray:
    """The boolean mask [I, J] of `encode_rle`."""
    values = np.arange(len(rle["counts"])) % 2 == 1
    return np.repeat(values, rle["counts"]).reshape(rle["size"], order="F")
