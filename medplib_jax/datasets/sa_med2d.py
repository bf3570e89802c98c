"""SA-Med2D-20M, or a part of it, as a folder of images with named masks, for `write_qa`.

COMMAND
    python -m medplib_jax.datasets.sa_med2d --source SAMed2Dv1 --out data/pairs --match "ct_00--AbdomenCT1K--*"

Reads images/, masks/ (IMAGE--CLASS_INSTANCE.png) and SAMed2D_v1_class_mapping_id.json. Writes images/,
masks/<image>/<name>_NNN.png (hard links where the disk allows), manifest.json and skipped.jsonl.

skipped.jsonl names each image without a mask, each mask without an image, and each mask whose class has no name or one
that says nothing to a reader: "class3", "left", or "union_...", which unites classes that have masks of their own.
"""

import argparse
import collections
import fnmatch
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.command import finish, parse
from medplib_jax.datasets.files import Folder, safe_name, unused
from medplib_jax.datasets.mecovqa import class_name, parse_mask_name, read_class_names, stem

_NO_NAME = re.compile(r"class ?\d*|left|right|union .*", re.IGNORECASE)


def make_pairs(source: str, out: str, match: str = "*") -> dict[str, Any]:
    """Makes the folder `out` of the images whose name (without .png) matches; returns its manifest.

    DataError when no mask can be used.
    """
    masks, problems = _masks_by_image(source, match)
    names, counts = read_class_names(source), collections.Counter()
    with Folder(out, "sa_med2d", source) as folder:
        for image in tqdm(sorted(masks), desc="SA-Med2D-20M", unit="image"):
            path = os.path.join(source, "images", f"{image}.png")
            if not os.path.isfile(path):
                lost = [os.path.join(source, "masks", mask) for mask in masks[image]]
                problems += [DataError(mask, None, "mask without its image", path, "nothing") for mask in lost]
                continue
            unnamed = [
                error for mask in sorted(masks[image]) if (error := _place_mask(source, folder, image, mask, names))
            ]
            problems += unnamed
            if len(unnamed) < len(masks[image]):
                folder.link(path, f"images/{image}.png")
                counts["images"] += 1
                counts["masks"] += len(masks[image]) - len(unnamed)
        if not counts:
            raise problems[0] if problems else DataError(source, None, "no masks", f"masks/{match}", "none")
        manifest = {**counts, "match": match, **folder.write_problems(problems)}
        folder.write_json("manifest.json", manifest)
    return manifest


def _masks_by_image(source: str, match: str) -> tuple[dict[str, list[str]], list[DataError]]:
    """Names of the masks of each image that matches, and problems.

    A problem for each matching file that is neither a mask nor an image with masks.
    """
    for folder in ("images", "masks"):
        if not os.path.isdir(os.path.join(source, folder)):
            raise DataError(source, None, "not SA-Med2D-20M", "folders images/ and masks/", f"no {folder}/")
    masks, others = collections.defaultdict(list), []
    for name in _names_in(source, "masks"):
        image = stem(name).rpartition("--")[0]
        if not fnmatch.fnmatch(image, match):
            continue
        if name.endswith(".png"):
            masks[image].append(name)
        else:
            others.append(f"masks/{name}")
    for name in _names_in(source, "images"):
        if fnmatch.fnmatch(stem(name), match) and (stem(name) not in masks or not name.endswith(".png")):
            others.append(f"images/{name}")
    return masks, unused(source, sorted(others), "images/IMAGE.png with masks/IMAGE--CLASS_INSTANCE.png")


def _names_in(source: str, folder: str) -> Iterator[str]:
    """Names of the files, one by one, because there are twenty million of them."""
    with os.scandir(os.path.join(source, folder)) as entries:
        yield from (entry.name for entry in entries if not entry.name.startswith("."))


def _place_mask(
    source: str, folder: Folder, image: str, mask: str, names: dict[tuple[str, int], str]
) -> DataError | None:
    """Puts one mask under its class's name; the error when its class has none."""
    path, name = os.path.join(source, "masks", mask), class_name(mask, names)
    if not name:
        expected = "an entry in SAMed2D_v1_class_mapping_id.json"
        return DataError(path, None, "class without a name", expected, parse_mask_name(mask).label)
    if _NO_NAME.fullmatch(name):
        return DataError(path, None, "class name says nothing", "the name of a structure", name)
    instance = parse_mask_name(mask).instance or "000"
    folder.link(path, f"masks/{image}/{safe_name(name)}_{instance}.png")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="the unpacked collection")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--match", default="*", help="pattern of image names without .png, e.g. 'ct_00--*'")
    arguments = parse(parser)
    return finish(lambda: make_pairs(arguments.source, arguments.out, arguments.match))


if __name__ == "__main__":
    sys.exit(main())
