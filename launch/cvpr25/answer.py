"""Answers cases of the CVPR 2025 challenge on text-guided 3D segmentation: inputs/*.npz to outputs/*.npz.

COMMAND
    python -m launch.cvpr25.answer --checkpoint WORKDIR --inputs inputs --outputs outputs

An input holds imgs [D, H, W] (0 to 255), spacing (x, y, z in mm) and text_prompts, {"1": text, ..., "instance_label": 0
or 1}. An output holds segs [D, H, W]: the numbers of the prompts; with instance_label 1 the connected parts of their
masks, counted on. A case that cannot be used is named, the others are answered; the exit status is then 1.
"""

import argparse
import io
import os
import pickle
import sys
import zipfile
from typing import Any

import numpy as np
from numpy.lib import format as npy
from scipy import ndimage
from tqdm import tqdm

from medplib_jax.data.errors import DataError
from medplib_jax.decode.predictor import Predictor
from medplib_jax.decode.scans import QUESTION, STRUCTURE, answer_slices
from medplib_jax.parallel.compilation import use_cache
from medplib_jax.volumes.pictures import pictures
from medplib_jax.volumes.volume import Volume, check_affine, check_size
from medplib_jax.volumes.windows import Tone

_HARMLESS = {("numpy", "ndarray"), ("numpy", "dtype")}
_RECONSTRUCT = ("numpy._core.multiarray", "numpy.core.multiarray")


class PlainUnpickler(pickle.Unpickler):
    """Makes arrays of plain Python values and nothing else; a file from outside must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS or (module in _RECONSTRUCT and name in ("_reconstruct", "scalar")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")


def read_case(path: str) -> tuple[Volume, dict[int, str], bool]:
    """The volume, the prompts by number, and whether instances are wanted. DataError for a case of another form."""
    try:
        with np.load(path) as file:
            values, spacing = file["imgs"], np.asarray(file["spacing"], np.float64)
        prompts = dict(_read_object(path, "text_prompts"))
        instances = bool(int(prompts.pop("instance_label", 0)))
        prompts = {int(number): str(text) for number, text in prompts.items()}
    except (OSError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        expected = "imgs, spacing and text_prompts"
        raise DataError(path, None, "case cannot be read", expected, f"{type(error).__name__}: {error}") from error
    if values.ndim != 3 or spacing.shape != (3,) or not prompts or min(prompts) < 1:
        found = f"imgs {values.shape}, spacing {spacing.shape}, prompts {sorted(prompts)}"
        raise DataError(path, None, "case of another form", "[D, H, W], 3 numbers, prompts from 1 on", found)
    check_size(path, values.shape)
    affine = check_affine(path, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))  # as DICOM: left, behind, up
    name = os.path.basename(path).removesuffix(".npz")
    tone = Tone(0.0, 255.0)  # the challenge's own scale
    return Volume(values.transpose(2, 1, 0), affine, name, tone=tone, files=(path,)), prompts, instances


def _read_object(path: str, name: str) -> Any:
    """A dict that was saved as an array of one object."""
    with zipfile.ZipFile(path) as archive:
        content = io.BytesIO(archive.read(f"{name}.npy"))
    npy.read_magic(content)
    npy.read_array_header_1_0(content)
    return PlainUnpickler(content).load().item()


def answer_case(predictor: Predictor, path: str, question: str) -> np.ndarray:
    """segs [D, H, W]; see the head of the file."""
    volume, prompts, instances = read_case(path)
    shown = pictures(volume, "acquired")
    segments, last = np.zeros(volume.shape, np.uint16), 0
    for number, text in sorted(prompts.items()):
        mask = np.zeros(volume.shape, bool)
        planes = shown.cut.reoriented(mask)
        for one in answer_slices(predictor, shown, text, question, range(len(shown))):
            if one.mask is not None:
                planes[one.number] = one.mask
        if instances:
            parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
            segments[mask] = parts[mask] + last
            last += count
        else:
            segments[mask] = number
    return segments.transpose(2, 1, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="workdir of a training run")
    parser.add_argument("--inputs", default="inputs")
    parser.add_argument("--outputs", default="outputs")
    parser.add_argument("--question", default=QUESTION, help=f"with {STRUCTURE} where the prompt's text goes")
    arguments = parser.parse_args()
    use_cache()
    names = sorted(name for name in os.listdir(arguments.inputs) if name.endswith(".npz"))
    predictor, failed = Predictor(arguments.checkpoint), 0
    os.makedirs(arguments.outputs, exist_ok=True)
    for name in tqdm(names, desc="cases", unit="case"):
        try:
            segments = answer_case(predictor, os.path.join(arguments.inputs, name), arguments.question)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        partial = os.path.join(arguments.outputs, f".{name}")
        np.savez_compressed(partial, segs=segments)
        os.replace(partial, os.path.join(arguments.outputs, name))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
