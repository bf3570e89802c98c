"""Routes for scans, in the shape of VoxTell's server: images are uploaded once, jobs answer them in the background.

`POST /images`, `POST /jobs`, `GET /jobs/{id}/events`, `GET /jobs/{id}/result`, `POST /jobs/{id}/cancel`.
"""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.background import BackgroundTask

from medplib_jax.decode.scans import QUESTION, ScanOptions
from medplib_jax.serve.pictures import encoded
from medplib_jax.serve.refusals import Refused
from medplib_jax.serve.scans import Scans
from medplib_jax.serve.store import Store
from medplib_jax.serve.volume_jobs import OUT, UNFINISHED, Job, JobRunner
from medplib_jax.volumes.geometry import PLANES
from medplib_jax.volumes.windows import NAMED, PERCENTILE

EVENT_SECONDS = 0.1  # between two looks at a job
RESULTS = {  # format -> (file, media type)
    "nifti": ("masks.nii.gz", "application/gzip"),
    "dicom_seg": ("segmentation.dcm", "application/dicom"),
    "names": ("masks.json", "application/json"),
    "table": ("table.tsv", "text/tab-separated-values"),
    "preview": ("preview.png", "image/png"),
    "page": ("preview.html", "text/html"),
    "slices": ("slices.jsonl", "application/x-ndjson"),
}
MAX_STRUCTURES, MAX_WORDS = 32, 200
Name = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
Index = Annotated[int | None, Query(ge=0, lt=2**31)]
Plane = Literal["acquired", "axial", "coronal", "sagittal"]


class JobRequest(BaseModel):
    """What is to be found in an image. `prompts`, `image_id` and `keep_largest` are VoxTell's, the rest `predict`'s."""

    model_config = ConfigDict(extra="forbid")

    image_id: str
    prompts: str | list[str]
    keep_largest: bool = False
    model: str = ""
    question: str = Field(QUESTION, max_length=2000)
    plane: Plane = "acquired"
    window: str = Field("", max_length=100)
    slices: tuple[int, int] | None = None
    every: int = Field(1, ge=1, le=1000)
    smooth: float = Field(0.0, ge=0, le=50)
    index: int | None = Field(None, ge=0, lt=2**31)

    def options(self) -> ScanOptions:
        """Refused: what `predict` would not take."""
        prompts = [self.prompts] if isinstance(self.prompts, str) else self.prompts
        prompts = tuple(prompt.strip() for prompt in prompts)
        if not all(0 < len(prompt) <= MAX_WORDS for prompt in prompts) or not 0 < len(prompts) <= MAX_STRUCTURES:
            expected = f"1 to {MAX_STRUCTURES} structures of 1 to {MAX_WORDS} characters"
            raise Refused(400, f"expected {expected}", "prompts")
        if not all(text.isprintable() for text in (*prompts, self.question)):
            raise Refused(400, "expected words without control characters", "prompts")
        same = {
            name: getattr(self, name) for name in ("question", "plane", "window", "slices", "every", "smooth", "index")
        }
        try:
            return ScanOptions(prompts, **same, largest_component=self.keep_largest)
        except ValueError as error:
            raise Refused(400, str(error), "prompts") from error


class SliceMask(BaseModel):
    """A mask on the picture of a slice."""

    label: str = Field(min_length=1, max_length=MAX_WORDS, pattern=r"^[^\x00-\x1f\x7f]*$")
    slice: int
    rle: dict


class ExportRequest(BaseModel):
    plane: Plane = "acquired"
    masks: list[SliceMask] = Field(min_length=1, max_length=MAX_STRUCTURES)


def make_router(scans: Scans, runner: JobRunner, store: Store, models: Mapping[str, bool]) -> APIRouter:
    """`models`: those that are served, and whether they draw masks."""
    router = APIRouter()
    router.include_router(_image_routes(scans), prefix="/images", tags=["images"])
    router.include_router(_job_routes(scans, runner, store, models), prefix="/jobs", tags=["jobs"])

    @router.get("/capabilities", tags=["jobs"])
    def capabilities() -> dict[str, Any]:
        drawing = [name for name, draws in models.items() if draws]
        return {
            "model": next(iter(models)),
            "models": drawing,
            "planes": list(PLANES),
            "windows": {**NAMED, PERCENTILE: None},
            "results": list(RESULTS),
        }

    return router


def _image_routes(scans: Scans) -> APIRouter:
    router = APIRouter()

    @router.post("", responses={400: {}, 413: {}, 429: {}})
    async def upload(request: Request) -> JSONResponse:
        """A scan as the body, as a ZIP archive, or as the files of a form."""
        info, _ = await scans.add(request)
        return JSONResponse(info, headers={"X-Meta": json.dumps(info)})

    @router.get("/{name}")
    def describe(name: Name, request: Request, index: Index = None) -> dict[str, Any]:
        return scans.info(name, request.state.client, index)

    @router.delete("/{name}")
    def remove(name: Name, request: Request) -> dict[str, bool]:
        scans.remove(name, request.state.client)
        return {"removed": True}

    @router.get("/{name}/slices/{number}")
    def picture(
        name: Name,
        number: int,
        request: Request,
        plane: Plane = "acquired",
        window: Annotated[str, Query(max_length=100)] = "",
        index: Index = None,
    ) -> Response:
        """A slice as the model sees it, a PNG."""
        shown = scans.pictures(name, request.state.client, index, plane, window)
        if not 0 <= number < len(shown):
            raise Refused(404, f"expected a slice from 0 to {len(shown) - 1}")
        return Response(encoded(shown[number]), media_type="image/png", headers={"Cache-Control": "private"})

    @router.post("/{name}/export")
    def export(
        name: Name,
        body: ExportRequest,
        request: Request,
        format: Literal["nifti", "dicom_seg"] = "nifti",
        index: Index = None,
    ) -> FileResponse:
        """Masks of single slices as a file in the scan's own space."""
        shown = scans.pictures(name, request.state.client, index, body.plane, "0,1")
        folder = tempfile.TemporaryDirectory()
        drawn = [(mask.label, mask.slice, mask.rle) for mask in body.masks]
        path = scans.export(shown, drawn, format, folder.name)
        return FileResponse(
            path, media_type=RESULTS[format][1], filename=path.name, background=BackgroundTask(folder.cleanup)
        )

    return router


def _job_routes(scans: Scans, runner: JobRunner, store: Store, models: Mapping[str, bool]) -> APIRouter:
    router = APIRouter()

    @router.post("")
    def start(body: JobRequest, request: Request) -> dict[str, str]:
        name = body.model or next((name for name, draws in models.items() if draws), "")
        if not models.get(name):
            raise Refused(400, "expected a model that draws masks", "model")
        return {"job_id": runner.submit(request.state.client, body.image_id, name, body.options()).id}

    @router.get("/{name}")
    def describe(name: Name, request: Request) -> dict[str, Any]:
        return runner.job(name, request.state.client).shown()

    @router.get("/{name}/events")
    def events(name: Name, request: Request) -> StreamingResponse:
        """A JSON line whenever more slices are answered; the last one has the job's `status`."""
        job = runner.job(name, request.state.client)
        return StreamingResponse(_events(job), media_type="application/x-ndjson")

    @router.get("/{name}/result")
    def result(name: Name, request: Request, format: Literal[tuple(RESULTS)] = "nifti") -> FileResponse:
        file, kind = RESULTS[format]
        job = _finished(runner.job(name, request.state.client))
        if file not in job.files:
            raise Refused(404, f"this job has no {file}: it is written for DICOM series with a place in the patient")
        return FileResponse(store.folder("jobs", name) / OUT / file, media_type=kind, filename=file)

    @router.get("/{name}/slices/{number}")
    def masks(name: Name, number: int, request: Request, plane: Plane = "acquired") -> list[dict[str, Any]]:
        """The masks on a slice of a plane, as in a chat's answer, with areas in mm2."""
        job = _finished(runner.job(name, request.state.client))
        shown = scans.pictures(job.image_id, request.state.client, job.options.index, plane, "0,1")
        return scans.masks(name, shown, number)

    @router.post("/{name}/cancel")
    def cancel(name: Name, request: Request) -> dict[str, bool]:
        runner.cancel(runner.job(name, request.state.client))
        return {"cancelling": True}

    @router.delete("/{name}")
    def remove(name: Name, request: Request) -> dict[str, bool]:
        runner.remove(runner.job(name, request.state.client))
        return {"removed": True}

    return router


def _finished(job: Job) -> Job:
    """Refused: a job that is not done."""
    if job.status != "done":
        raise Refused(409, job.message or f"the job is not finished: {job.status}")
    return job


async def _events(job: Job) -> AsyncIterator[str]:
    told = None
    while job.status in UNFINISHED:
        if told != (told := (job.done, job.total)):
            yield json.dumps({"done": job.done, "total": job.total}) + "\n"
        await asyncio.sleep(EVENT_SECONDS)
    yield json.dumps({"status": job.status} | ({"message": job.message} if job.message else {})) + "\n"
