"""Volume jobs: scans answered in the background, one after the other, on the code of `predict`.

A job is kept in the store from the moment it is accepted. One that a stopped or killed server left unfinished goes on
when it starts again, from the slices that were answered.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from medplib_jax.data.errors import DataError
from medplib_jax.decode.scans import ScanModel, ScanOptions, answer_scan
from medplib_jax.serve.refusals import Refused, told
from medplib_jax.serve.store import ENTRY, Store, read_json, write_json
from medplib_jax.serve.waiting import FairQueue
from medplib_jax.volumes.results import STORE as SLICES

log = logging.getLogger(__name__)

MAX_VOXELS = 2**28  # of a scan; 512 x 512 x 1024
SCAN, OUT = "scan", "out"  # folders of an image and of a job
UNFINISHED = ("queued", "running")
IDLE_SECONDS = 1.0
SWEEP_SECONDS = 300.0


class Cancelled(Exception):
    """A job that is not wanted any more."""


class Interrupted(Exception):
    """A job that goes on when the server starts again."""


@dataclasses.dataclass
class Job:
    """A job as the server holds it. `status`: queued, running, done, cancelled, or error with a `message`.

    `done` and `total` count slices of all structures. `files` are there once it is done.
    """

    id: str
    client: str
    image_id: str
    model: str
    options: ScanOptions
    status: str = "queued"
    message: str = ""
    done: int = 0
    total: int = 0
    files: tuple[str, ...] = ()
    created: float = dataclasses.field(default_factory=time.time)
    wanted: bool = True

    def shown(self) -> dict[str, Any]:
        """What its client sees."""
        content = dataclasses.asdict(self) | {"prompts": list(self.options.structures)}
        return {key: value for key, value in content.items() if key not in ("client", "wanted")}

    def kept(self) -> dict[str, Any]:
        """What `from_kept` makes a job of again."""
        content = dataclasses.asdict(self)
        del content["id"], content["wanted"]
        return content


def from_kept(name: str, content: dict[str, Any]) -> Job:
    options = content["options"]
    slices = options["slices"] and tuple(options["slices"])
    options = ScanOptions(**options | {"structures": tuple(options["structures"]), "slices": slices})
    return Job(name, **content | {"options": options, "files": tuple(content["files"])})


class JobRunner:
    """Accepts jobs and runs them in a thread of its own. `models`: what answers slices for a client, by name."""

    def __init__(self, store: Store, models: dict[str, Callable[[str], ScanModel]], capacity: int):
        self._store, self._models = store, models
        self._waiting = FairQueue(capacity)
        self._jobs = {
            name: from_kept(name, read_json(store.folder("jobs", name) / ENTRY)) for name in store.names("jobs")
        }
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Begins, with the jobs of an earlier server first."""
        for job in sorted(self._jobs.values(), key=lambda job: job.created):
            if job.status in UNFINISHED and not self._waiting.put(job):
                self._end(job, "error", "more jobs were left than may wait")
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Interrupts what runs; it goes on with the next server."""
        self._closing.set()
        self._thread.join(seconds)

    def submit(self, client: str, image_id: str, model: str, options: ScanOptions) -> Job:
        """A new job, kept and waiting. Refused: an unknown image, and more jobs than may wait."""
        self._store.path("images", image_id, client)
        with self._store.add("jobs", client) as (name, folder, content):
            job = Job(name, client, image_id, model, options)
            (folder / OUT).mkdir()
            content.update(job.kept())
        self._jobs[job.id] = job
        if not self._waiting.put(job):
            self.remove(job)
            raise Refused(429, "too many jobs are waiting; try again later", retry_after=60)
        return job

    def job(self, name: str, client: str) -> Job:
        """A client's job. Refused with 404 for another's, too."""
        self._store.path("jobs", name, client)
        if name not in self._jobs:
            raise Refused(404, "no such entry in jobs")
        return self._jobs[name]

    def cancel(self, job: Job) -> None:
        """Gives it up: at once while it waits, at its next slice while it runs."""
        job.wanted = False
        if job.status == "queued":
            self._end(job, "cancelled")

    def remove(self, job: Job) -> None:
        self.cancel(job)
        self._store.remove("jobs", job.id)
        self._jobs.pop(job.id, None)

    def in_use(self) -> dict[str, set[str]]:
        """Entries of the store that must not go, by kind."""
        running = [job for job in list(self._jobs.values()) if job.status in UNFINISHED]
        return {"jobs": {job.id for job in running}, "images": {job.image_id for job in running}}

    def _run(self) -> None:
        swept = 0.0
        while not self._closing.is_set():
            try:
                if time.monotonic() - swept > SWEEP_SECONDS:
                    swept = time.monotonic()
                    self._sweep()
                for job in self._waiting.take(1):
                    self._answer(job)
            except Exception:  # a full disk, for one: the next job may end well
                log.exception("the store of jobs failed")
            self._waiting.wait(IDLE_SECONDS)

    def _sweep(self) -> None:
        self._store.sweep(self.in_use())
        known = set(self._jobs)  # first: a job is in the store before it is known here
        for name in known.difference(self._store.names("jobs")):
            self._jobs.pop(name, None)

    def _answer(self, job: Job) -> None:
        """Runs a job to its end, whatever that is."""
        if not job.wanted:
            return
        try:
            job.status = "running"
            self._save(job)
            job.files = tuple(self._files(job))
            self._end(job, "done")
        except Interrupted:
            job.status = "queued"
        except Cancelled:
            self._end(job, "cancelled")
        except DataError as error:
            self._end(job, "error", told(error))
        except (ValueError, RuntimeError) as error:
            self._end(job, "error", str(error))
        except Exception as error:
            if job.wanted:  # else its files were removed while it ran
                log.exception("a job failed")
            self._end(job, "error", f"the server failed ({type(error).__name__})")

    def _files(self, job: Job) -> list[str]:
        def tell(done: int, total: int) -> None:
            job.done, job.total = done, total
            if self._closing.is_set():
                raise Interrupted
            if not job.wanted:
                raise Cancelled

        if job.model not in self._models:
            raise ValueError(f"{job.model} is not served any more")
        scan = self._store.folder("images", job.image_id) / SCAN
        out = self._store.folder("jobs", job.id) / OUT
        model = self._models[job.model](job.id)
        return [*answer_scan(model, str(scan), str(out), job.options, tell, MAX_VOXELS), SLICES]

    def _end(self, job: Job, status: str, message: str = "") -> None:
        job.status, job.message = status, message
        self._save(job)

    def _save(self, job: Job) -> None:
        with contextlib.suppress(FileNotFoundError):  # it was removed
            write_json(self._store.folder("jobs", job.id) / ENTRY, job.kept())
