"""From records to batches of static shape.

How the rows of a `BatchPlan` are read (`Loader`), and iterators that read ahead. The plan is a pure function of the
seed, so the position in the data IS the step number: a run resumes by asking for the next step, and every process reads
its own rows of the same batch, however many processes or worker processes there are.
"""

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ENCODED_MASK_SIDE, IclConfig, ModelConfig
from medplib_jax.data import chatml, images, prompts
from medplib_jax.data.cache import DiskCache, MemoryCache
from medplib_jax.data.encoded import Encoded
from medplib_jax.data.errors import DataError, Notice, Notices
from medplib_jax.data.icl import spelled_out, views
from medplib_jax.data.packing import pack
from medplib_jax.data.plan import BatchPlan
from medplib_jax.data.prepared import PreparedFiles
from medplib_jax.data.records import Record, check_images
from medplib_jax.data.sources import Source, open_source
from medplib_jax.data.tokenizers import AnyTokenizer, load_tokenizer

CACHE_BYTES = 2**30  # decoded and resized pixels kept per process
Arrays = dict[str, np.ndarray]
log = logging.getLogger("medplib_jax.data")


class Loader:
    """Reads records into rows of a batch. Pixels, masks and region points are kept in a bounded cache.

    sources: sequences of `Record`, such as those of `sources.open_source` or a list of records made on the spot. A
    batch is a dict with the names, shapes and types of `medplib_jax.batch.Batch`. An empty row has record -1, a single
    valid position, no loss weight and no mask. With several images, masks lie on (and the mask head sees) the last one.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Record]],
        tokenizer: AnyTokenizer,
        data: DataConfig,
        model: ModelConfig,
        cache_bytes: int = CACHE_BYTES,
    ):
        self._arguments = sources, tokenizer, data, model, cache_bytes
        self._sources, self.tokenizer, self._data, self._model = sources, tokenizer, data, model
        self._starts = np.cumsum([0, *map(len, sources)])
        self._disk = DiskCache(data.cache) if data.cache else None
        self._files = PreparedFiles(data, model, MemoryCache(cache_bytes), self._disk)

    def __reduce__(self):
        return Loader, self._arguments

    def __len__(self) -> int:
        return int(self._starts[-1])

    def over(self, sources: Sequence[Sequence[Record]]) -> "Loader":
        """A loader of other records with the same settings and the same cache."""
        other = Loader(sources, *self._arguments[1:])
        other._files = self._files
        return other

    @property
    def starts(self) -> list[int]:
        """The number of each source's first record, and that of all records."""
        return self._starts.tolist()

    def record(self, index: int) -> Record:
        """The record of this number, counted through all sources."""
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[source][index - int(self._starts[source])]

    def picture_size(self, record: Record) -> tuple[int, int]:
        """(height, width) of the record's last picture, on which its masks lie, as its file has it."""
        shown = self._files.view(record, views(record, self._model.icl)[-1], [])
        height, width = shown["size"].tolist()
        return height, width

    def encode(self, record: Record, question: bool = False) -> Encoded:
        """The record's text: the whole conversation, or the question only."""
        check_images(record)
        form = chatml if self._data.template in chatml.TEMPLATES else prompts
        encode: Callable[..., Encoded] = form.encode_question if question else form.encode_conversation
        settings = {
            "template": self._data.template,
            "image_tokens": self._model.image_tokens,
            "max_images": self._data.max_images,
            "max_length": self._data.bucket_lengths[-1],
        }
        if record.examples is not None:
            if form is chatml:
                raise record.error("record with examples", "a model that reads examples", self._model.family)
            icl = self._model.icl
            encoded_masks = tuple(view.kind == "encoded" for view in views(record, icl))
            record = spelled_out(record, icl)
            settings |= {"encoded_masks": encoded_masks, "mask_tokens": icl.mask_tokens}
        encoded = encode(record, self.tokenizer, **settings)
        if len(encoded.regions) > self._data.max_regions:
            raise record.error("too many regions", f"at most {self._data.max_regions}", str(len(encoded.regions)))
        if len(encoded.masks) > self._data.max_masks:
            raise record.error("too many masks", f"at most {self._data.max_masks}", str(len(encoded.masks)))
        return encoded

    def read_answer(self, ids: Sequence[int]) -> str:
        """The text of a generated answer; of BiRD's released inference what its scripts score."""
        if self._data.template == "qwen_raw":
            return chatml.extract_answer(self.tokenizer.decode(ids, skip_special=False))
        return self.tokenizer.decode(ids).strip()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Before which ids an answer ends."""
        return chatml.stop_ids(self._data.template, self.tokenizer)

    def plan(self, seed: int) -> tuple[BatchPlan, list[DataError]]:
        """The plan of all sources, and the records left out of it because their text cannot be used.

        With `on_error` raise the first of those is raised.
        """
        data, problems, lengths, groups = self._data, [], [], []
        for number, start in enumerate(self._starts[:-1]):
            costs, found = self._survey(number)
            problems += found
            if data.pack:
                own = pack(
                    costs[:, :3], (data.bucket_lengths[-1], data.max_images, data.max_regions), costs[:, 3] > 0, seed
                )
                lengths.append(np.array([costs[group, 0].sum() for group in own], np.int64))
                groups += [start + group for group in own]
            else:
                lengths.append(costs[:, 0])
        if problems and data.on_error == "raise":
            raise problems[0]
        return BatchPlan(lengths, data.bucket_lengths, data.batch_size, seed, data.weights, groups), problems

    def _survey(self, number: int) -> tuple[np.ndarray, list[DataError]]:
        """Positions, pictures, regions and what keeps a row of each record of a source, int64 [n, 4], and problems.

        Zeros stand where a record's text cannot be used. Kept on disk for sources that are files, because it takes
        tokenizing everything.
        """
        source, data = self._sources[number], self._data

        def make():
            costs, problems = np.zeros((len(source), 4), np.int64), []
            for index in range(len(source)):
                try:
                    record = source[index]
                    encoded = self.encode(record)
                    shown = sum(view.kind != "encoded" for view in views(record, self._model.icl))
                    alone = len(encoded.masks) + (record.examples is not None)
                    costs[index] = len(encoded), shown, len(encoded.regions), alone
                except DataError as error:
                    problems.append(error.args)
            return {"costs": costs, "problems": np.frombuffer(json.dumps(problems).encode(), np.uint8)}

        if self._disk is None or not isinstance(source, Source):
            found = make()
        else:
            settings = (data.template, data.bucket_lengths[-1], data.max_images, data.max_regions, data.max_masks)
            key = ("survey", source.fingerprint, self.tokenizer.fingerprint, self._model.image_tokens, *settings)
            key += (self._model.icl,) if self._model.icl != IclConfig() else ()  # files of before stay
            found = self._disk.get(key, make)
        return found["costs"], [DataError(*arguments) for arguments in json.loads(found["problems"].tobytes())]

    def load_batch(self, plan: BatchPlan, step: int, rows: Sequence[int]) -> tuple[Arrays, list[DataError]]:
        """These rows of a step's batch, and what was wrong or odd about records.

        With `on_error` skip a record that cannot be used is replaced by another. A notice comes when a file is
        prepared, not again when it comes from a cache.
        """
        bucket, numbers = plan.batch(step)
        augmented = self._data.region_augmentation != "none"
        return self._load(
            [plan.records(numbers[row]) for row in rows],
            bucket,
            False,
            lambda i: _replacements(plan, step, rows[i]),
            lambda i: plan.generator(step, rows[i]) if augmented else None,
        )

    def load_eval(self, indices: Sequence[int], rows: Sequence[int], question: bool) -> tuple[Arrays, list[DataError]]:
        """These rows of the batch made of these records, at the shortest bucket that fits all.

        A skipped record leaves its row empty.

        A question's `gt_masks` are those of the answer that follows it; their `seg_position` is 0, because the answer
        is not there.
        """
        longest = max((self._length(index, question) for index in indices if index >= 0), default=0)
        bucket = next(length for length in self._data.bucket_lengths if length >= longest)
        chosen = [(int(indices[row]),) if indices[row] >= 0 else () for row in rows]
        return self._load(chosen, bucket, question, lambda i: (), lambda i: None)

    def _length(self, index: int, question: bool) -> int:
        try:
            return len(self.encode(self.record(index), question))
        except DataError:
            if self._data.on_error == "raise":
                raise
            return 0

    def prepare(self, index: int) -> list[DataError]:
        """Reads one record, so that the caches hold it; what is odd about it.

        With `on_error` skip also why it cannot be used; else that is raised.
        """
        found: list[DataError] = []
        self._read_all((index,), False, None, found)
        return found

    def _load(
        self,
        rows: Sequence[tuple[int, ...]],
        length: int,
        question: bool,
        others: Callable[[int], Iterable[tuple[int, ...]]],
        generator: Callable[[int], np.random.Generator | None],
    ) -> tuple[Arrays, list[DataError]]:
        arrays, skipped = self._empty(len(rows), length), []
        for row, records in enumerate(rows):
            if not records:
                continue
            examples, tried = [], itertools.chain([records], others(row))
            while not examples and (records := next(tried, None)):
                examples = self._read_all(records, question, generator(row), skipped)
            if examples:
                _write(arrays, row, examples, self._model.image_tokens)
            elif not question and any(True for _ in others(row)):
                raise skipped[-1]
        return arrays, skipped

    def _read_all(self, records: tuple[int, ...], question: bool, rng, skipped: list[DataError]) -> list["_Example"]:
        """Those of the records that can be used."""
        examples = []
        for index in records:
            try:
                examples.append(self._read(index, question, rng, skipped))
            except DataError as error:
                if self._data.on_error == "raise":
                    raise
                skipped.append(error)
        return examples

    def _empty(self, batch: int, length: int) -> Arrays:
        data, model = self._data, self._model
        clip, sam, shown_masks = model.image_size, model.mask_image_size, data.max_images - 1
        points, canvas = model.region.max_points, data.mask_canvas
        arrays = {
            "tokens": np.zeros((batch, length), np.int32),
            "valid": np.zeros((batch, length), bool),
            "targets": np.zeros((batch, length), np.int32),
            "loss_weights": np.zeros((batch, length), np.float32),
            "feature_index": np.full((batch, length), -1, np.int32),
            "clip_pixels": np.zeros((batch, data.max_images, clip, clip, 3), np.uint8),
            "sam_pixels": np.zeros((batch, sam, sam, 3), np.uint8),
            "sam_box": np.tile(np.array([0, 0, sam, sam], np.int32), (batch, 1)),
            "region_points": np.zeros((batch, data.max_regions, points, 2), np.float32),
            "region_point_valid": np.zeros((batch, data.max_regions, points), bool),
            "region_image": np.zeros((batch, data.max_regions), np.int32),
            "seg_position": np.zeros((batch, data.max_masks), np.int32),
            "mask_valid": np.zeros((batch, data.max_masks), bool),
            "gt_masks": np.zeros((batch, data.max_masks, canvas, canvas), np.uint8),
            "mask_size": np.full((batch, 2), canvas, np.int32),
            "record": np.full(batch, -1, np.int32),
        } | ({"segment": np.zeros((batch, length), np.int32)} if data.pack else {})
        if model.icl.mask_tokens and shown_masks:
            side = ENCODED_MASK_SIDE
            arrays["example_masks"] = np.zeros((batch, shown_masks, side, side), np.uint8)
        # one valid token, so that no row attends to nothing
        arrays["tokens"][:, 0], arrays["valid"][:, 0] = self.tokenizer.bos_id, True
        return arrays

    def _read(self, index: int, question: bool, rng: np.random.Generator | None, notices: Notices) -> "_Example":
        record, new = self.record(index), []
        try:
            encoded = self.encode(record, question)
            shown = [self._files.view(record, view, new) for view in views(record, self._model.icl)]
            pictures = [view for view in shown if "clip" in view]
            sizes = [tuple(picture["size"].tolist()) for picture in pictures]
            points = [
                self._files.region(record, text, sizes[i], rng, new)
                for text, i in zip(encoded.regions, encoded.region_images, strict=True)
            ]
            masks = [self._files.mask(record.find(path), sizes[-1], new) for path in encoded.masks] if pictures else []
            if len(masks) != len(encoded.masks):
                raise record.error("mask without an image", "an image", "none")
        except DataError as error:
            raise error if error.record is not None else error.in_record(record.file, record.index) from error
        notices.extend(notice.in_record(record.file, record.index) for notice in new)
        encoded_masks = [view["encoded"] for view in shown if "encoded" in view]
        return _Example(index, encoded, pictures, points, masks, encoded_masks)


def _replacements(plan: BatchPlan, step: int, row: int) -> Iterator[tuple[int, ...]]:
    """The records to try instead of a row's own.

    They are found when the first is asked for, because that takes long and is rarely needed.
    """
    yield from map(plan.records, plan.replacements(step, row))


@dataclasses.dataclass(frozen=True)
class _Example:
    """One record, ready to be written into a row."""

    index: int
    encoded: Encoded
    pictures: list[Arrays]  # clip, sam, sam_box, size
    points: list[np.ndarray]  # of each region
    masks: list[np.ndarray]
    encoded_masks: list[np.ndarray]  # of examples, for the mask encoder


def _write(arrays: Arrays, row: int, examples: Sequence[_Example], patches: int) -> None:
    """Writes the examples one after another into a row.

    What belongs to a mask is there for the first one only; others have none. A record with examples has a row of its
    own.
    """
    first = examples[0]
    position = picture_slot = region_slot = 0
    image_features = arrays["clip_pixels"].shape[1] * patches
    for number, example in enumerate(examples, 1):
        encoded, place = example.encoded, slice(position, position + len(example.encoded))
        for name in ("tokens", "targets", "loss_weights"):
            arrays[name][row, place] = getattr(encoded, name)
        arrays["valid"][row, place] = True
        feature = encoded.feature_index
        shift = np.where(feature >= image_features, region_slot, picture_slot * patches)
        of_mask = image_features + arrays["region_points"].shape[1] - 2 - feature
        arrays["feature_index"][row, place] = np.where(
            feature >= 0, feature + shift, np.where(feature < -1, of_mask, -1)
        )
        if "segment" in arrays:
            arrays["segment"][row, place] = number
        for i, picture in enumerate(example.pictures, picture_slot):
            arrays["clip_pixels"][row, i] = picture["clip"]
        for i, points in enumerate(example.points):
            arrays["region_points"][row, region_slot + i, : len(points)] = points
            arrays["region_point_valid"][row, region_slot + i, : len(points)] = True
            arrays["region_image"][row, region_slot + i] = picture_slot + encoded.region_images[i]
        position, picture_slot, region_slot = (
            place.stop,
            picture_slot + len(example.pictures),
            region_slot + len(example.points),
        )
    arrays["record"][row] = first.index
    for i, mask in enumerate(first.encoded_masks):
        arrays["example_masks"][row, i] = mask
    if first.pictures:
        _write_masks(arrays, row, first)


def _write_masks(arrays: Arrays, row: int, example: _Example) -> None:
    last, canvas = example.pictures[-1], arrays["gt_masks"].shape[-1]
    size = tuple(last["size"].tolist())
    arrays["sam_pixels"][row], arrays["sam_box"][row] = last["sam"], last["sam_box"]
    arrays["mask_size"][row] = size if max(size) <= canvas else images.fit(size, canvas)
    for i, mask in enumerate(example.masks):
        arrays["gt_masks"][row, i, : mask.shape[0], : mask.shape[1]] = mask
        arrays["mask_valid"][row, i] = True
    positions = example.encoded.seg_positions
    arrays["seg_position"][row, : len(positions)] = positions


def make_loader(
    data: DataConfig, model: ModelConfig, root: str | None = None, cache_bytes: int = CACHE_BYTES
) -> Loader:
    """A loader of the configured sources; `root` is where their paths start, each file's folder by default."""
    if not data.sources:
        raise ValueError("data.sources names no annotation file")
    sources = [open_source(name, root) for name in data.sources]
    return Loader(sources, load_tokenizer(data.tokenizer), data, model, cache_bytes)


def train_batches(
    loader: Loader, plan: BatchPlan, rows: Sequence[int], start: int, stop: int, workers: int
) -> Iterator[tuple[Arrays, list[DataError]]]:
    """This process's rows of the batches of steps start..stop-1, read ahead by threads (workers 0) or processes."""
    return _read_ahead(functools.partial(loader.load_batch, plan, rows=tuple(rows)), range(start, stop), workers)


def eval_batches(
    loader: Loader, indices: Sequence[int], batch_size: int, rows: Sequence[int], question: bool, workers: int
) -> Iterator[tuple[Arrays, list[DataError]]]:
    """This process's rows of the batches that hold these records in order; the last one is filled with empty rows."""
    padded = np.pad(np.asarray(indices, np.int64), (0, -len(indices) % batch_size), constant_values=-1).reshape(
        -1, batch_size
    )
    for arrays, skipped in _read_ahead(
        functools.partial(_load_eval, loader, padded, tuple(rows), question), range(len(padded)), workers
    ):
        for notice in filter(_is_notice, skipped):
            log.warning("%s", notice)
        yield arrays, list(itertools.filterfalse(_is_notice, skipped))


def _is_notice(error: DataError) -> bool:
    return isinstance(error, Notice)


def _load_eval(loader: Loader, batches: np.ndarray, rows: tuple[int, ...], question: bool, step: int):
    return loader.load_eval(batches[step], rows, question)


def _read_ahead(load: Callable[[int], tuple], steps: range, workers: int) -> Iterator[tuple]:
    import grain  # imports jax, which nothing else in data/ needs
    from absl import flags

    dataset = grain.MapDataset.range(steps.start, steps.stop).map(functools.partial(_error_as_value, load))
    if workers:
        if not flags.FLAGS.is_parsed():  # in a notebook or script without absl's app; grain's workers read the defaults
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0)).mp_prefetch(options)
    else:
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    for result in dataset:
        if isinstance(result, DataError):
            raise result
        arrays, skipped = result
        # a worker's arrays lie in shared memory that is unmapped with them; jax may keep a view of what it is given, so
        # copy
        yield {name: np.array(array, subok=False) for name, array in arrays.items()} if workers else arrays, skipped


def _error_as_value(load: Callable[[int], tuple], step: int) -> tuple | DataError:
    """Grain rewrites the exceptions that pass through it; a value arrives as it is, from another process too."""
    try:
        return load(step)
    except DataError as error:
        return error
