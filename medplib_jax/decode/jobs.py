"""Many pictures and scans answered by one command: a list of jobs, or a folder, resumed by record.

A job is {"image": path, "question": text, "region": "box:...", "id": name} for a picture, {"image": path, "structures":
["liver", ...]} for a scan; what it lacks comes from the command line. Paths are relative to the list's folder.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.data.errors import DataError
from medplib_jax.data.rle import encode_rle
from medplib_jax.decode.predictor import Predictor
from medplib_jax.decode.scans import ScanOptions, answer_scan
from medplib_jax.volumes.formats import SUFFIXES
from medplib_jax.volumes.read import is_scan

ANSWERS = "answers.jsonl"
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
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not entry.keys() <= _KEYS:
            raise DataError(
                path, number, "not a job", f"an object with image, and of {sorted(_KEYS)}", str(entry)[:200]
            )
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


def answer_jobs(predictor: Predictor, jobs: Iterable[Job], out: str, options: ScanOptions) -> int:
    """Answers the jobs that answers.jsonl in `out` does not hold yet, and adds a line for each; how many failed.

    options: of scans, but for what a job says. A line holds the job, its answer, predicted IoU and masks as COCO run
    lengths, or the names of the files of a scan; or what is wrong with it.
    """
    os.makedirs(out, exist_ok=True)
    path, failed = os.path.join(out, ANSWERS), 0
    done = _answered(path)
    with open(path, "a", encoding="utf-8") as file:
        for job in tqdm(list(jobs), desc="jobs", unit="job"):
            asked = json.loads(json.dumps({**dataclasses.asdict(job), "model": predictor.identity}))
            if asked in done:
                continue
            try:
                found = _answer(predictor, job, os.path.join(out, _folder(job.id)), options)
            except (ValueError, OSError) as error:  # DataError among them
                found, failed = {"error": str(error)}, failed + 1
            file.write(json.dumps({"job": asked, **found}) + "\n")
            file.flush()
    return failed


def _answer(predictor: Predictor, job: Job, folder: str, options: ScanOptions) -> dict[str, Any]:
    if is_scan(job.image):
        changes = {"structures": job.structures or options.structures}
        changes |= {"question": job.question} if job.question else {}
        return {"files": answer_scan(predictor, job.image, folder, dataclasses.replace(options, **changes))}
    question = job.question or options.question.replace("{structure}", " and the ".join(job.structures))
    found = predictor(job.image, question, job.region, options.seed)
    os.makedirs(folder, exist_ok=True)
    for number, mask in enumerate(found.masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(os.path.join(folder, f"mask_{number}.png"))
    masks = [encode_rle(mask) for mask in found.masks]
    return {"answer": found.answer, "masks": masks, "predicted_iou": list(found.predicted_iou)}


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
