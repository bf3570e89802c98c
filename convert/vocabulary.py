"""The tokenizer that belongs to a checkpoint, and rows for tokens that its embedding does not have yet."""

import dataclasses
import hashlib
import pathlib
import shutil

import numpy as np

from medplib_jax import checkpoint
from medplib_jax.data.bpe_tokenizer import BPE_FILE, BpeTokenizer, is_byte_level
from medplib_jax.data.qwen_tokenizer import RANKS_FILE, QwenTokenizer
from medplib_jax.data.tokenizers import ADDED_FILE, ADDED_TOKENS, MODEL_FILE, Tokenizer, load_tokenizer

FILES = (MODEL_FILE, RANKS_FILE, BPE_FILE)  # the first that a folder has counts
VOCABULARY_AXIS = {"llm/embed/embedding": 0, "llm/head/kernel": 1}


def find_tokenizer(given: pathlib.Path | None, folders: list[pathlib.Path]) -> pathlib.Path:
    """The folder of the tokenizer: `given`, else the first of `folders` that has one.

    Raises FileNotFoundError without any, ValueError when `given` is another tokenizer than the one that lies beside the
    weights."""
    beside = [folder for folder in folders if model_file(folder)]
    if given is None:
        if not beside:
            raise FileNotFoundError(
                f"no {', '.join(FILES)} beside the weights ({', '.join(map(str, folders))}); "
                "give its folder with --tokenizer"
            )
        return beside[0]
    if not model_file(given):
        raise FileNotFoundError(f"{given}: expected one of {', '.join(FILES)}")
    for folder in beside:
        if _digest(folder) != _digest(given):
            raise ValueError(
                f"{model_file(given)} is another tokenizer than {model_file(folder)}, which belongs to the weights"
            )
    return given


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies a tokenizer's files into `folder`, with the list of added tokens that LLaVA's and LLaMA's lack."""
    folder.mkdir(exist_ok=True)
    for path in checkpoint.tokenizer_files(str(source)):
        shutil.copyfile(path, folder / path.name)
    if (folder / MODEL_FILE).is_file() and not (folder / ADDED_FILE).exists():
        Tokenizer.load(str(folder)).save(str(folder))
    if model_file(folder) == folder / BPE_FILE:
        BpeTokenizer.load(str(folder), ADDED_TOKENS).save(str(folder))


@dataclasses.dataclass(frozen=True)
class Rows:
    """What becomes of an embedding's rows (and of lm_head's columns): the first `kept` stay, `grown` follow.

    A new one is the mean of those that stay. The original draws them from a normal distribution (transformers'
    `resize_token_embeddings`) and trains them. The mean is LLaVA's rule for its own added tokens: it needs no seed and
    starts every new token at the average score.
    """

    kept: int
    grown: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.grown

    def shape(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape afterwards; `path` says whether it has a vocabulary axis."""
        return tuple(self.total if axis == VOCABULARY_AXIS.get(path) else size for axis, size in enumerate(shape))

    def fill(self, path: str, array: np.ndarray) -> np.ndarray:
        """The parameter afterwards."""
        axis = VOCABULARY_AXIS.get(path)
        if axis is None or array.shape[axis] == self.total:
            return array
        kept = array.take(range(self.kept), axis)
        mean = kept.mean(axis=axis, keepdims=True, dtype=np.float32).astype(array.dtype)
        return np.concatenate([kept, np.repeat(mean, self.grown, axis=axis)], axis=axis)


def fit(folder: pathlib.Path, rows: int, image_token: int | None = None) -> Rows:
    """The rows for a tokenizer, of an embedding of `rows` rows that has all of MedPLIB's added tokens or none.

    Hugging Face's LLaVA has an `<image>` token behind those of the tokenizer, and padding up to a round number. No text
    uses these rows, so they go. ValueError when the tokenizer does not fit.
    """
    if (folder / RANKS_FILE).is_file():
        size = QwenTokenizer.load(str(folder)).vocab_size
        if rows != size:
            raise ValueError(f"{folder}: wrong tokenizer: it needs {size} rows, but the weights have {rows}")
        return Rows(size)
    size = load_tokenizer(str(folder)).vocab_size
    base = size - len(ADDED_TOKENS)
    if rows == size or (image_token == size and image_token < rows):
        return Rows(size)
    if rows == base or (image_token == base and image_token < rows):
        return Rows(base, len(ADDED_TOKENS))
    raise ValueError(
        f"{folder}: wrong tokenizer: it has {base} pieces and {len(ADDED_TOKENS)} added tokens, "
        f"so the embedding should have {base} or {size} rows, but the weights have {rows}"
    )


def _digest(folder: pathlib.Path) -> str:
    return hashlib.sha256(model_file(folder).read_bytes()).hexdigest()


def model_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The tokenizer's vocabulary in a folder: LLaMA's, Qwen's, or a byte-level BPE."""
    found = next((path for name in FILES if (path := folder / name).is_file()), None)
    return None if found and found.name == BPE_FILE and not is_byte_level(str(found)) else found
