"""Many pictures and scans answered by one command: a list of jobs, or a folder, resumed by record.

A job is {"image": path, "question": text, "region": "box:...", "id": name} for a picture, {"image": path, "structures":
["liver", ...]} for a scan; what it lacks comes from the command line. Paths are relative to the list's folder.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.data.errors import DataError
from medplib_jax.data.polygons import geojson
from medplib_jax.data.rle import decode_rle, encode_rle
from medplib_jax.decode.many import answer_questions
from medplib_jax.decode.masks import mask_labels, remove_answer
from medplib_jax.decode.predictor import Prediction, Predictor, read_question
from medplib_jax.decode.scans import ScanOptions, answer_scan, scan_model
from medplib_jax.volumes.formats import SUFFIXES
from medplib_jax.volumes.read import is_scan

log = logging.getLogger(__name__)

ANSWERS = "answers.jsonl"
TOGETHER = 256  # pictures that are read and answered at once
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_KEYS = {"id", "image", "question", "region", "structures"}


@dataclasses.dataclass(frozen=True)
class Job:
    """id: unique; names the job's folder of masks. image: a path."""

    id: str
    image: str
    question: str = ""
    region: str = ""
    structures: tuple[str, ...] = ()


def read_jobs(path: str, question: str = "", structures: tuple[str, ...] = ()) -> list[Job]:
    """The jobs of a JSON list, JSON lines, or of every picture and volume file below a folder.

    DataError for a list of another form, a job without a question, or two of one id.
    """
    if os.path.isdir(path):
        entries = [{"id": os.path.relpath(file, path), "image": file} for file in _files_below(path)]
    else:
        entries = _entries(path)
    jobs: dict[str, Job] = {}
    for number, entry in enumerate(entries):
        if not _is_job(entry):
            expected = f"an object of texts, with image and of {sorted(_KEYS)}, structures a list"
            raise DataError(path, number, "not a job", expected, str(entry)[:200])
        image = os.path.join(os.path.dirname(os.path.abspath(path)), entry["image"])
        wanted = entry.get("structures", [] if entry.get("question") else list(structures))
        job = Job(
            str(entry.get("id", f"{number:05d}")),
            image,
            entry.get("question", question),
            entry.get("region", ""),
            tuple(wanted),
        )
        if not job.question and not job.structures:
            raise DataError(path, number, "job without a question", "question or structures", str(entry)[:200])
        if (other := jobs.setdefault(_folder(job.id), job)) is not job:
            raise DataError(path, number, "two jobs would share their files", "ids that differ in letters", other.id)
    if not jobs:
        raise DataError(path, None, "no jobs", f"pictures ({', '.join(PICTURES)}) or scans", "none")
    return list(jobs.values())


def _is_job(entry: Any) -> bool:
    if not isinstance(entry, dict) or not entry.keys() <= _KEYS:
        return False
    structures = entry.get("structures", [])
    texts = [entry.get("image"), entry.get("question", ""), entry.get("region", "")]
    return isinstance(structures, list) and all(isinstance(text, str) for text in (*texts, *structures))


def answer_jobs(predictor: Predictor, jobs: Sequence[Job], out: str, options: ScanOptions) -> int:
    """Answers the jobs that answers.jsonl in `out` does not hold yet, and adds a line for each; how many failed.

    What another model, other options or other files answered is asked again.

    options: of scans, but for what a job says. A line holds the job, its answer, predicted IoU and masks as COCO run
    lengths, boxes of a model that draws none, or the names of the files of a scan; or what is wrong with it. Pictures
    are answered `TOGETHER` at a time. In the end coco.json holds the masks of the last answer to each id.
    """
    os.makedirs(out, exist_ok=True)
    path, failed, cut_off = os.path.join(out, ANSWERS), 0, 0
    done = {json.dumps(job, sort_keys=True) for job in _answered(path)}
    same = {"model": predictor.identity, "options": dataclasses.asdict(options)}
    asked = [json.loads(json.dumps({**dataclasses.asdict(job), **same, "files": _state(job)})) for job in jobs]
    todo = [number for number, job in enumerate(asked) if json.dumps(job, sort_keys=True) not in done]
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(jobs), desc="jobs", unit="job") as bar:
        bar.update(len(jobs) - len(todo))
        for number, found in _answers(predictor, {number: jobs[number] for number in todo}, out, options):
            failed += "error" in found
            cut_off += found.get("cut_off", False)
            file.write(json.dumps({"job": asked[number], **found}) + "\n")
            file.flush()
            bar.update()
    _write_coco(path, os.path.join(out, "coco.json"))
    if cut_off:
        log.warning("%d of %d answers were cut off; their lines in %s say so", cut_off, len(todo), path)
    return failed


def _state(job: Job) -> str:
    """A digest of the sizes and times of the files that a job names."""
    files = [path for path in (job.image, job.region) if os.path.isfile(path)]
    files += [os.path.join(folder, name) for folder, _, names in os.walk(job.image) for name in names]
    found = [(path, os.stat(path)) for path in sorted(files) if os.path.exists(path)]
    states = [[path, state.st_size, state.st_mtime_ns] for path, state in found]
    return hashlib.blake2b(json.dumps(states).encode(), digest_size=16).hexdigest()


def _answers(
    predictor: Predictor, jobs: Mapping[int, Job], out: str, options: ScanOptions
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What is found for each job, as it ends."""
    scans = {number: job for number, job in jobs.items() if is_scan(job.image)}
    pictures = [(number, job) for number, job in jobs.items() if number not in scans]
    for start in range(0, len(pictures), TOGETHER):
        yield from _answer_pictures(predictor, dict(pictures[start : start + TOGETHER]), out, options)
    for number, job in scans.items():
        changes = {"structures": job.structures or options.structures}
        changes |= {"question": job.question} if job.question else {}
        folder = os.path.join(out, _folder(job.id))
        try:
            files = answer_scan(scan_model(predictor), job.image, folder, dataclasses.replace(options, **changes))
            yield number, {"files": files}
        except (ValueError, OSError) as error:  # DataError among them
            yield number, {"error": str(error)}


def _answer_pictures(
    predictor: Predictor, jobs: Mapping[int, Job], out: str, options: ScanOptions
) -> Iterator[tuple[int, dict[str, Any]]]:
    asked = {}
    for number, job in jobs.items():
        question = job.question or options.question.replace("{structure}", " and the ".join(job.structures))
        try:
            asked[number] = read_question(job.image, question, job.region)
        except (ValueError, OSError) as error:
            yield number, {"error": str(error)}
    for number, found in answer_questions(predictor, asked, options.seed):
        if isinstance(found, DataError):
            yield number, {"error": str(found)}
        else:
            yield number, _write_masks(found, jobs[number], os.path.join(out, _folder(jobs[number].id)))


def _write_masks(found: Prediction, job: Job, folder: str) -> dict[str, Any]:
    """A picture's masks as PNG and GeoJSON; its line's content."""
    os.makedirs(folder, exist_ok=True)
    remove_answer(folder)
    for number, mask in enumerate(found.masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(os.path.join(folder, f"mask_{number}.png"))
    labels = list(job.structures) if len(job.structures) == len(found.masks) else mask_labels(found.answer)
    labels = labels[: len(found.masks)]
    if found.masks:
        with open(os.path.join(folder, "masks.geojson"), "w", encoding="utf-8") as file:
            json.dump(geojson(list(zip(labels, found.masks, strict=True))), file)
    line = {"answer": found.answer, "size": list(found.picture.shape[:2]), "labels": labels}
    line |= {"cut_off": True} if found.cut_off else {}
    line |= {"masks": [encode_rle(mask) for mask in found.masks], "predicted_iou": list(found.predicted_iou)}
    if found.boxes is None:
        return line
    size = found.picture.shape[1::-1]
    return line | {"boxes": [{"label": box.label, "box": list(box.pixels(*size))} for box in found.boxes]}


def _write_coco(answers: str, path: str) -> None:
    """The masks of the answered pictures in COCO's form, with the predicted IoU as their score."""
    with open(answers, encoding="utf-8") as file:
        last = {line["job"]["id"]: line for line in map(json.loads, file)}
    lines = [line for line in last.values() if "masks" in line]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    categories: dict[str, int] = {}
    for line in lines:
        height, width = line["size"]
        images.append({"id": len(images), "file_name": line["job"]["image"], "height": height, "width": width})
        for label, rle, iou in zip(line["labels"], line["masks"], line["predicted_iou"], strict=True):
            rows, columns = np.nonzero(decode_rle(rle))
            box = (
                [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
                if len(rows)
                else [0] * 4
            )
            own = {"id": len(annotations), "image_id": len(images) - 1, "score": iou, "iscrowd": 0}
            category = categories.setdefault(label, len(categories) + 1)
            own |= {"category_id": category, "segmentation": rle, "area": len(rows), "bbox": box}
            annotations.append(own)
    named = [{"id": number, "name": name} for name, number in categories.items()]
    partial = f"{path}.{os.getpid()}.tmp"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"images": images, "annotations": annotations, "categories": named}, file)
    os.replace(partial, path)


def _answered(path: str) -> list[dict[str, Any]]:
    """The jobs that were answered; failed ones are tried again. What an interruption left of a line is cut off."""
    if not os.path.exists(path):
        return []
    with open(path, "rb+") as file:
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line["job"] for line in lines if "error" not in line]


def _entries(path: str) -> list[Any]:
    try:
        with open(path, encoding="utf-8") as file:
            if path.lower().endswith(".jsonl"):
                return [json.loads(line) for line in file if line.strip()]
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, None, "jobs cannot be read", "a JSON list, or JSON lines (.jsonl)", str(error)) from error
    if not isinstance(found, list):
        raise DataError(path, None, "jobs cannot be read", "a JSON list", type(found).__name__)
    return found


def _files_below(root: str) -> list[str]:
    found = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names if name[0] != ".")
    return sorted(file for file in found if file.lower().endswith((*PICTURES, *SUFFIXES, ".dcm")))


def _folder(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"
