"""Asks a trained model about one picture or scan, with or without a marked region, and draws the masks of its answer.

COMMAND
    python -m medplib_jax.predict --checkpoint WORKDIR --image a.png --out answer --question "Please segment the liver."
    python -m medplib_jax.predict --checkpoint WORKDIR --image a.png --out answer --question "What is <region>?" \\
        --box 40,60,90,120
    python -m medplib_jax.predict --checkpoint WORKDIR --image a.png --out answer --example b.png=b_mask.png
    python -m medplib_jax.predict --checkpoint WORKDIR --image a.png --out answer --examples INDEX --structure liver
    python -m medplib_jax.predict --checkpoint WORKDIR --image a.png --out answer --chat \\
        --question "Is {left} larger than {right}?" --region left=box:40,60,90,120 --region right=point:80,30
    python -m medplib_jax.predict --checkpoint WORKDIR --image SCAN --out answer --structures "liver; spleen"
    python -m medplib_jax.predict --checkpoint WORKDIR --jobs jobs.jsonl --out answers

A SCAN is a DICOM folder or file, NIfTI, NRRD or MetaImage; see medplib_jax/volumes/README.md for what is written.
Of a picture it prints the answer; writes `mask_<k>.png` (0/255, the picture's size) and `overlay.png`.
Up to three examples, pictures with masks, say what to draw instead of words: given by `--example`, or those of an index
(medplib_jax.datasets.index) that are most similar to the image and have a mask of the structure. An image that
is in the index itself, and what else it holds of its patient, is left out.
With --chat each line of the standard input is a question of one conversation, and answer k goes to the folder `turn_k`.
A model that answers with boxes takes --box or --point, draws each box of its answer with its phrase on the overlay, and
writes `boxes.json`, in pixels. With `--masks sam --sam-checkpoint WORKDIR` the SAM-Med2D of a MedPLIB checkpoint draws
what lies in each of these boxes.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from medplib_jax.parallel.imports import without_collection

with without_collection():
    import numpy as np
    from PIL import Image

    from medplib_jax.batch import Batch
    from medplib_jax.checkpoint import find_step
    from medplib_jax.data.errors import DataError
    from medplib_jax.data.icl_form import MAX_EXAMPLES, REQUEST
    from medplib_jax.data.overlay import PALETTE, draw_boxes, overlay
    from medplib_jax.decode.box_masks import BoxDrawer
    from medplib_jax.decode.jobs import answer_jobs, read_jobs
    from medplib_jax.decode.layout import QUANTIZE
    from medplib_jax.decode.masks import remove_answer
    from medplib_jax.decode.predictor import Prediction, Predictor, read_question
    from medplib_jax.decode.sampling import Sampling
    from medplib_jax.decode.scans import add_scan_flags, answer_scan, scan_model, scan_options
    from medplib_jax.parallel.compilation import use_cache
    from medplib_jax.volumes.read import is_scan

SINGLE = ("point", "box", "scribble", "region_mask")  # flags of a region without a name


def write_prediction(prediction: Prediction, out_dir: str | os.PathLike) -> list[Path]:
    """Writes the masks and the overlay as PNG files, and returns their paths.

    Masks and boxes of an earlier answer are removed.
    """
    out = Path(out_dir)
    remove_answer(out)
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


def regions_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The regions of the command line as references by name; one given by its shape has none. ValueError for others."""
    found = {}
    for text in arguments.region:
        name, is_named, reference = text.partition("=")
        if not (is_named and reference and re.fullmatch(r"\w+", name)) or name in found:
            raise ValueError(f"--region {text}: expected NAME=SHAPE:... or NAME=FILE, each name once")
        found[name] = reference
    for shape in ("point", "box", "scribble"):
        if getattr(arguments, shape) is not None:
            found[""] = f"{shape}:{getattr(arguments, shape)}"
    return found | ({"": arguments.region_mask} if arguments.region_mask else {})


def example_of(text: str) -> tuple[str, str]:
    """Type of the option --example: "image.png=mask.png"."""
    image, _, mask = text.rpartition("=")
    if not image or not mask:
        raise argparse.ArgumentTypeError(f"example without a mask: expected IMAGE=MASK, found {text!r}")
    return image, mask


def retrieved(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """The examples that `--examples` finds for the image, which are printed.

    The same file is none of them, nor are others of its patient where the index knows it. DataError when there is none.
    """
    from medplib_jax.datasets.embedding import Embedder
    from medplib_jax.datasets.image_index import ImageIndex  # few questions need builders

    index, name = ImageIndex(arguments.examples), arguments.structure
    if name not in index.names:
        raise DataError(arguments.examples, None, "no mask of this structure", ", ".join(index.names), repr(name))
    embedder = Embedder(arguments.checkpoint)
    index.check_weights(embedder.digest)
    query = embedder(embedder.read(arguments.image)[None])
    (hits,) = index.search(query, arguments.top_k, name, pictures=[arguments.image])
    if not hits:
        raise DataError(
            arguments.examples, None, f"no other patient's picture with a mask of {name}", "at least one", "none"
        )
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
    add_region_flags(parser)
    shown = parser.add_argument_group("examples")
    shown.add_argument("--example", type=example_of, action="append", default=[], metavar="IMAGE=MASK")
    shown.add_argument(
        "--examples",
        metavar="INDEX",
        help="an index of pictures, of which the most similar are shown; not the image, nor others of its patient "
        "where it holds the image",
    )
    shown.add_argument("--structure", default="", metavar="NAME", help="whose masks are shown; with --examples")
    shown.add_argument("--top-k", type=int, default=MAX_EXAMPLES, help="how many; with --examples")
    parser.add_argument("--chat", action="store_true", help="ask on: each line of the standard input is a question")
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
        help="8 bits, half the memory of bfloat16: int8 for weights, w8a8 for activations in products, too (faster on"
        " chips with an int8 unit), kv for the KV cache",
    )
    add_scan_flags(parser)
    arguments = parser.parse_args(join_negative(sys.argv[1:]))
    scan = bool(arguments.jobs) or is_scan(arguments.image)
    check_examples(parser, arguments, scan)
    has_words = arguments.question or arguments.example or arguments.examples or arguments.chat
    if not (has_words or arguments.jobs or (scan and arguments.structures)):
        parser.error("expected --question, or --structures for a scan")
    if bool(arguments.masks) != bool(arguments.sam_checkpoint):
        parser.error("--masks sam and --sam-checkpoint WORKDIR: expected both or neither")
    if scan and arguments.masks:
        parser.error("--masks is of the boxes of an answer about a picture: expected none with a scan or with jobs")
    if scan and (arguments.region or arguments.chat or any(getattr(arguments, name) for name in SINGLE)):
        parser.error("a region is of a picture, and so is --chat: expected none with a scan or with jobs")
    return arguments, scan


def add_region_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of what is marked on a picture; `regions_of` reads them."""
    region = parser.add_mutually_exclusive_group()
    region.add_argument("--point", metavar="x,y", help="in pixels of the picture, as all regions")
    region.add_argument("--box", metavar="x0,y0,x1,y1")
    region.add_argument("--scribble", metavar='"x,y x,y ..."')
    region.add_argument(
        "--region-mask", metavar="FILE", help="mask of the picture's size; the region is where it is not 0"
    )
    parser.add_argument(
        "--region",
        action="append",
        default=[],
        metavar="NAME=SHAPE:...|FILE",
        help="a region by name, repeatable; it stands at {NAME} in the question, else at its <region>, else behind it",
    )
    parser.add_argument("--normalized", action="store_true", help="coordinates are shares of width and height")


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
        answer = prepare_scans(arguments) if scan else prepare_picture(arguments)
        find_step(arguments.checkpoint)
        predictor = Predictor(
            arguments.checkpoint,
            max_new_tokens=arguments.max_new_tokens,
            mask_threshold=arguments.mask_threshold,
            sampling=Sampling(arguments.temperature, arguments.top_p),
            quantize=arguments.quantize,
        )
        drawer = box_drawer(predictor, arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        answer(predictor, drawer)
    except (DataError, OSError) as error:  # any other error in answering is ours and keeps its traceback
        sys.exit(f"error: {error}")


def prepare_scans(arguments: argparse.Namespace) -> Callable[[Predictor, BoxDrawer | None], None]:
    """What answers scans or jobs. Whatever is wrong with the command line is raised here, before a model is loaded."""
    options, out = scan_options(arguments), arguments.out
    structures = options.structures if arguments.question or arguments.structures else ()
    jobs = read_jobs(arguments.jobs, arguments.question or "", structures) if arguments.jobs else None
    make_folder(Path(out))

    def answer(predictor: Predictor, _: BoxDrawer | None) -> None:
        if jobs is not None:
            sys.exit(1 if answer_jobs(predictor, jobs, out, options) else 0)
        names = answer_scan(scan_model(predictor), arguments.image, out, options)
        print(Path(out, "table.tsv").read_text(encoding="utf-8"), end="")
        print(*(Path(out, name) for name in names), sep="\n", file=sys.stderr)

    return answer


def prepare_picture(arguments: argparse.Namespace) -> Callable[[Predictor, BoxDrawer | None], None]:
    """As `prepare_scans`, for a picture."""
    regions, out = regions_of(arguments), Path(arguments.out)
    Sampling(arguments.temperature, arguments.top_p)
    examples = retrieved(arguments) if arguments.examples else arguments.example
    ask = functools.partial(read_question, arguments.image, examples=examples, normalized=arguments.normalized)
    later = arguments.chat and not (arguments.question or examples)
    asked = ask("What is it?" if later else arguments.question or "", regions)
    for notice in asked.notices:
        print(f"notice: {notice}", file=sys.stderr)
    make_folder(out)

    def answer(predictor: Predictor, drawer: BoxDrawer | None) -> None:
        if not arguments.chat:
            show(predictor, drawer, *predictor.prompt(asked), out, arguments.seed)
            return
        earlier: tuple[tuple[str, str], ...] = ()
        for number, question in enumerate(questions(arguments.question or (examples and REQUEST))):
            mentioned = {name: one for name, one in regions.items() if not earlier or f"{{{name}}}" in question}
            try:
                turn = ask(question, mentioned, earlier=earlier)
                picture, prompt = predictor.prompt(turn)
            except ValueError as error:  # the next question may be a better one
                print(f"error: {error}", file=sys.stderr)
                continue
            text = show(predictor, drawer, picture, prompt, out / f"turn_{number}", arguments.seed)
            earlier = (*turn.record.turns, ("gpt", text))

    return answer


def questions(first: str | None) -> Iterator[str]:
    """The first question, then those of the standard input, until it ends."""
    if first:
        yield first
    yield from filter(None, (line.strip() for line in sys.stdin))


def show(
    predictor: Predictor, drawer: BoxDrawer | None, picture: np.ndarray, prompt: Batch, out: Path, seed: int
) -> str:
    """Prints the answer to a prompt and writes its masks; returns its text."""
    prediction = predictor.answer(picture, prompt, seed)
    if drawer:
        prediction = with_masks(prediction, drawer)
    print(prediction.answer, flush=True)
    if prediction.cut_off:
        print("notice: the answer was cut off; --max-new-tokens says how long it may be", file=sys.stderr)
    make_folder(out)
    for path in write_prediction(prediction, out):
        print(path, file=sys.stderr)
    return prediction.answer


if __name__ == "__main__":
    main()
