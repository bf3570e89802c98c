"""Asks a trained model about one picture or scan, with or without a marked region, and draws the masks of its answer.

COMMAND
    python -m medplib_jax.predict --checkpoint WORKDIR --image a.png --out answer --question "Please segment the liver."
    python -m medplib_jax.predict --checkpoint WORKDIR --image a.png --out answer --question "What is <region>?" \\
        --box 40,60,90,120
    python -m medplib_jax.predict --checkpoint WORKDIR --image a.png --out answer --example b.png=b_mask.png
    python -m medplib_jax.predict --checkpoint WORKDIR --image a.png --out answer --examples INDEX --structure liver
    python -m medplib_jax.predict --checkpoint WORKDIR --image SCAN --out answer --structures "liver; spleen"
    python -m medplib_jax.predict --checkpoint WORKDIR --jobs jobs.jsonl --out answers

A SCAN is a DICOM folder or file, NIfTI, NRRD or MetaImage; see medplib_jax/volumes/README.md for what is written.
Of a picture it prints the answer; writes `mask_<k>.png` (0/255, the picture's size) and `overlay.png`.
Up to three examples, pictures with masks, say what to draw instead of words: given by `--example`, or those of an index
(medplib_jax.datasets.index) that are most similar to the image and have a mask of the structure.
A model that answers with boxes takes --box or --point, draws each box of its answer with its phrase on the overlay, and
writes `boxes.json`, in pixels. With `--masks sam --sam-checkpoint WORKDIR` the SAM-Med2D of a MedPLIB checkpoint draws
what lies in each of these boxes.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from medplib_jax.checkpoint import find_step
from medplib_jax.data.errors import DataError
from medplib_jax.data.icl_form import MAX_EXAMPLES
from medplib_jax.data.overlay import PALETTE, draw_boxes, overlay
from medplib_jax.datasets.image_index import ImageIndex
from medplib_jax.datasets.index import Embedder
from medplib_jax.decode.box_masks import BoxDrawer
from medplib_jax.decode.jobs import answer_jobs, read_jobs
from medplib_jax.decode.layout import QUANTIZE
from medplib_jax.decode.predictor import Prediction, Predictor, read_question
from medplib_jax.decode.sampling import Sampling
from medplib_jax.decode.scans import add_scan_flags, answer_scan, scan_options
from medplib_jax.parallel.compilation import use_cache
from medplib_jax.volumes.read import is_scan

_MASK_FILE = re.compile(r"mask_\d+\.png")


def write_prediction(prediction: Prediction, out_dir: str | os.PathLike) -> list[Path]:
    """Writes the masks and the overlay as PNG files, and returns their paths.

    Masks of an earlier answer are removed.
    """
    out = Path(out_dir)
    for old in out.iterdir():
        if _MASK_FILE.fullmatch(old.name):
            old.unlink()
    pictures = {f"mask_{k}.png": mask.astype(np.uint8) * 255 for k, mask in enumerate(prediction.masks)}
    height, width = prediction.picture.shape[:2]
    boxes = [
        {"label": box.label, "box": list(box.pixels(width, height)), "text": str(box)} for box in prediction.boxes or ()
    ]
    drawn = overlay(prediction.picture, prediction.masks, PALETTE)
    pictures["overlay.png"] = draw_boxes(drawn, [one["box"] for one in boxes], [one["label"] for one in boxes], PALETTE)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(out / name)
    names = list(pictures)
    if prediction.boxes is not None:
        names.append("boxes.json")
        (out / "boxes.json").write_text(json.dumps(boxes, indent=1) + "\n")
    return [out / name for name in names]


def box_drawer(predictor: Predictor, arguments: argparse.Namespace) -> BoxDrawer | None:
    """What draws masks from the answer's boxes, None where it is not asked for.

    ValueError for a model whose answers hold no boxes, and as `BoxDrawer`.
    """
    if not arguments.masks:
        return None
    if predictor.draws_masks:
        raise ValueError(f"--masks {arguments.masks}: {arguments.checkpoint} draws its masks itself")
    return BoxDrawer(arguments.sam_checkpoint)


def with_masks(prediction: Prediction, drawer: BoxDrawer) -> Prediction:
    """The prediction with a mask for each of its boxes."""
    height, width = prediction.picture.shape[:2]
    boxes = [box.pixels(width, height) for box in prediction.boxes or ()]
    masks, predicted_iou = drawer(prediction.picture, boxes)
    return dataclasses.replace(prediction, masks=masks, predicted_iou=predicted_iou)


def make_folder(out: Path) -> None:
    """Makes the folder of an answer. OSError when it cannot be made, or nothing can be written into it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
        pass


def region_of(arguments: argparse.Namespace) -> str:
    """The region of the command line as a reference, empty without one."""
    for shape in ("point", "box", "scribble"):
        if getattr(arguments, shape) is not None:
            return f"{shape}:{getattr(arguments, shape)}"
    return arguments.region_mask or ""


def example_of(text: str) -> tuple[str, str]:
    """Type of the option --example: "image.png=mask.png"."""
    image, _, mask = text.rpartition("=")
    if not image or not mask:
        raise argparse.ArgumentTypeError(f"example without a mask: expected IMAGE=MASK, found {text!r}")
    return image, mask


def retrieved(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The examples that `--examples` finds for the image, which are printed. DataError when there is none."""
    index, name = ImageIndex(arguments.examples), arguments.structure
    if name not in index.names:
        raise DataError(arguments.examples, None, "no mask of this structure", ", ".join(index.names), repr(name))
    embedder = Embedder(arguments.checkpoint)
    index.check_weights(embedder.digest)
    query = embedder(embedder.read(arguments.image)[None])
    (hits,) = index.search(query, arguments.top_k, name, pictures=[arguments.image])
    for hit in hits:
        print(f"example: {hit.image} (cosine {hit.score:.3f})", file=sys.stderr)
    return [(hit.image, hit.masks[name]) for hit in hits]


def join_negative(words: list[str]) -> list[str]:
    """`--box -5,3,20,20` as `--box=-5,3,20,20`: argparse takes what begins with "-" and is no single number for an
    option.
    """
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in ("--point", "--box", "--scribble") and re.match(r"-[\d.]", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def parse_arguments() -> tuple[argparse.Namespace, bool]:
    """The command line, and whether it is about scans."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", required=True, help="workdir of a training run, or its WORKDIR/checkpoints/STEP"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", help="a picture or scan")
    what.add_argument(
        "--jobs", metavar="FILE|FOLDER", help="many of them: JSON list or lines, or a folder; see decode/jobs.py"
    )
    parser.add_argument("--question", help="may hold one <region>; without it a region goes to the end")
    parser.add_argument("--out", required=True, help="folder for the masks and the overlay")
    region = parser.add_mutually_exclusive_group()
    region.add_argument("--point", metavar="x,y", help="in pixels of the picture, as all regions")
    region.add_argument("--box", metavar="x0,y0,x1,y1")
    region.add_argument("--scribble", metavar='"x,y x,y ..."')
    region.add_argument(
        "--region-mask", metavar="FILE", help="mask of the picture's size; the region is where it is not 0"
    )
    shown = parser.add_argument_group("examples")
    shown.add_argument("--example", type=example_of, action="append", default=[], metavar="IMAGE=MASK")
    shown.add_argument("--examples", metavar="INDEX", help="an index of pictures, of which the most similar are shown")
    shown.add_argument("--structure", default="", metavar="NAME", help="whose masks are shown; with --examples")
    shown.add_argument("--top-k", type=int, default=MAX_EXAMPLES, help="how many; with --examples")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--mask-threshold", type=float)
    parser.add_argument("--masks", choices=("sam",), help="of an answer with boxes: what draws a mask from each")
    parser.add_argument("--sam-checkpoint", metavar="WORKDIR", help="the MedPLIB checkpoint of --masks sam")
    parser.add_argument(
        "--quantize",
        choices=QUANTIZE[1:],
        default="",
        help="8 bits, half the memory of bfloat16: int8 for weights, kv for the KV cache",
    )
    add_scan_flags(parser)
    arguments = parser.parse_args(join_negative(sys.argv[1:]))
    scan = bool(arguments.jobs) or is_scan(arguments.image)
    check_examples(parser, arguments, scan)
    has_examples = arguments.example or arguments.examples
    if not (arguments.question or has_examples or arguments.jobs or (scan and arguments.structures)):
        parser.error("expected --question, or --structures for a scan")
    if bool(arguments.masks) != bool(arguments.sam_checkpoint):
        parser.error("--masks sam and --sam-checkpoint WORKDIR: expected both or neither")
    if scan and arguments.masks:
        parser.error("--masks is of the boxes of an answer about a picture: expected none with a scan or with jobs")
    if scan and region_of(arguments):
        parser.error("a region is of a picture: expected none with a scan or with jobs, which name their own")
    return arguments, scan


def check_examples(parser: argparse.ArgumentParser, arguments: argparse.Namespace, scan: bool) -> None:
    """Ends with what is wrong about the options of examples."""
    if (arguments.example or arguments.examples) and scan:
        parser.error("examples are shown before a picture: expected none with a scan or with jobs")
    if arguments.example and arguments.examples:
        parser.error("expected --example or --examples, found both")
    if arguments.examples and not arguments.structure:
        parser.error("--examples needs --structure, the name of the masks to show")
    if not 1 <= arguments.top_k <= MAX_EXAMPLES:
        parser.error(f"--top-k {arguments.top_k}: expected 1 to {MAX_EXAMPLES}")


def main():
    arguments, scan = parse_arguments()
    use_cache()
    try:
        options = scan_options(arguments) if scan else None
        sampling = Sampling(arguments.temperature, arguments.top_p)
        if not scan:  # what is wrong with a question is said before the model is loaded
            examples = retrieved(arguments) if arguments.examples else arguments.example
            question = arguments.question or ""
            asked = read_question(arguments.image, question, region_of(arguments), examples)
            for notice in asked.notices:
                print(f"notice: {notice}", file=sys.stderr)
            make_folder(Path(arguments.out))
        find_step(arguments.checkpoint)
        predictor = Predictor(
            arguments.checkpoint,
            max_new_tokens=arguments.max_new_tokens,
            mask_threshold=arguments.mask_threshold,
            sampling=sampling,
            quantize=arguments.quantize,
        )
        if arguments.jobs:
            jobs = read_jobs(arguments.jobs, arguments.question or "", options.structures)
            sys.exit(1 if answer_jobs(predictor, jobs, arguments.out, options) else 0)
        if options:
            names = answer_scan(predictor, arguments.image, arguments.out, options)
            print(Path(arguments.out, "table.tsv").read_text(encoding="utf-8"), end="")
            return print(*(Path(arguments.out, name) for name in names), sep="\n", file=sys.stderr)
        picture, prompt = predictor.prompt(arguments.image, question, region_of(arguments), examples)
        drawer = box_drawer(predictor, arguments)
    except (
        ValueError,
        OSError,
    ) as error:  # what was given cannot be used; an error in answering is ours and keeps its traceback
        sys.exit(f"error: {error}")
    prediction = predictor.answer(picture, prompt, arguments.seed)
    if drawer:
        prediction = with_masks(prediction, drawer)
    print(prediction.answer)
    for path in write_prediction(prediction, arguments.out):
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
