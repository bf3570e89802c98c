"""A subset of MONAI Label's interface, so that its extensions for 3D Slicer and OHIF can ask this server.

`GET /info/`, `PUT /session/`, `GET` and `DELETE /session/{id}`, `POST /infer/{model}`. A session's image is an image
of the store; what is to be found stands in the form's `params` as `prompts`, else the server was told at its start.
"""

import asyncio
import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import ValidationError
from starlette.background import BackgroundTask
from urllib3.filepost import encode_multipart_formdata

from medplib_jax.serve.dicomweb import DicomWeb, is_uid
from medplib_jax.serve.refusals import Refused
from medplib_jax.serve.scans import Scans
from medplib_jax.serve.store import Store
from medplib_jax.serve.uploads import receive_fields
from medplib_jax.serve.volume_jobs import OUT, UNFINISHED, Job, JobRunner
from medplib_jax.serve.volumes import JobRequest

POLL_SECONDS = 0.1
Output = Literal["image", "json", "all", "dicom_seg"]


class Monai:
    """What the routes share. `models`: those that are served, and whether they draw masks; `structures`: see above.

    `source`: where images lie that are named by their SeriesInstanceUID.
    """

    def __init__(
        self,
        scans: Scans,
        runner: JobRunner,
        store: Store,
        models: Mapping[str, bool],
        structures: Sequence[str],
        source: DicomWeb | None,
    ):
        self.scans, self._runner, self._store = scans, runner, store
        self.models = [name for name, draws in models.items() if draws]
        self.structures, self._source = list(structures), source

    def info(self) -> dict[str, Any]:
        labels = {name: number for number, name in enumerate(self.structures, start=1)}
        model = {"type": "segmentation", "labels": labels, "dimension": 3, "config": {"prompts": self.structures}}
        models = {name: model | {"description": f"{name}: asked for each structure by name"} for name in self.models}
        about = {"name": "medplib_jax", "description": "For research. Not a medical device.", "version": "1"}
        nothing: dict[str, Any] = {"trainers": {}, "strategies": {}, "scoring": {}, "train_stats": {}, "datastore": {}}
        return about | {"labels": labels, "models": models} | nothing

    async def infer(self, request: Request, model: str, image: str, params: dict[str, Any]) -> Job:
        """The finished job of an image. It is cancelled when the client goes away before."""
        try:
            known = {name: value for name, value in params.items() if name in JobRequest.model_fields}
            asked = JobRequest(**{"prompts": self.structures} | known | {"image_id": image, "model": model})
        except ValidationError as error:
            raise Refused(400, str(error.errors()[0]["msg"]), "params") from error
        if not self.structures and "prompts" not in params:
            raise Refused(400, 'expected params like {"prompts": ["liver"]}, or a server started with --structures')
        job = self._runner.submit(request.state.client, image, model, asked.options())
        try:
            while job.status in UNFINISHED:
                if await request.is_disconnected():
                    raise Refused(499, "the client has gone")
                await asyncio.sleep(POLL_SECONDS)
            if job.status != "done":
                raise Refused(400, job.message or f"the job was {job.status}")
        except BaseException:
            self.remove(job)
            raise
        return job

    async def fetch(self, request: Request, series: str) -> str:
        """The identifier of a series of the DICOMweb source. Refused without one."""
        if self._source is None:
            raise Refused(404, "this server has no DICOMweb source (--dicomweb URL)", "image")
        fill = functools.partial(self._source.fetch, series)
        return await run_in_threadpool(self.scans.add_files, request.state.client, fill)

    def remove(self, job: Job) -> None:
        """The server keeps nothing of what it has answered."""
        self._runner.remove(job)

    def file(self, job: Job, name: str) -> Path:
        if name not in job.files:
            raise Refused(400, "a DICOM SEG is written for DICOM series with a place in the patient", "output")
        return self._store.folder("jobs", job.id) / OUT / name


def make_router(monai: Monai) -> APIRouter:
    router = APIRouter(tags=["MONAI Label"])

    @router.get("/info", include_in_schema=False)
    @router.get("/info/")
    def info() -> dict[str, Any]:
        return monai.info()

    @router.put("/session", include_in_schema=False)
    @router.put("/session/")
    async def open_session(request: Request, uncompress: bool = False, expiry: int = 0) -> dict[str, Any]:
        """Keeps an image; archives are unpacked whatever `uncompress` says, and the server's own bounds hold."""
        found, _ = await monai.scans.add(request)
        return {"session_id": found["image_id"], "session_info": _session(found)}

    @router.get("/session/{name}")
    def session(name: str, request: Request) -> dict[str, Any]:
        return _session(monai.scans.info(name, request.state.client))

    @router.delete("/session/{name}")
    def close_session(name: str, request: Request) -> dict[str, Any]:
        found = monai.scans.info(name, request.state.client)
        monai.scans.remove(name, request.state.client)
        return _session(found)

    @router.post("/infer/{model}")
    async def infer(
        model: str,
        request: Request,
        image: Annotated[str, Query(max_length=200)] = "",
        session_id: Annotated[str, Query(max_length=200)] = "",
        output: Output | None = None,
    ) -> Response:
        """Masks of an image: the label map, facts about it, both as a form (`all`), or a DICOM SEG."""
        if model not in monai.models:
            raise Refused(404, f"expected one of the models {', '.join(monai.models)}, found {model!r}", "model")
        named = session_id or image
        found, fields = await _image_of(monai, request, named)
        held = contextlib.ExitStack()  # what goes with the answer
        if found != named:
            held.callback(monai.scans.remove, found, request.state.client)
        try:
            job = await monai.infer(request, model, found, _params(fields.get("params", "{}")))
            held.callback(monai.remove, job)
            response = _answer(monai, job, output)
        except BaseException:
            held.close()
            raise
        response.background = BackgroundTask(held.close)
        return response

    return router


async def _image_of(monai: Monai, request: Request, image: str) -> tuple[str, dict[str, str]]:
    """The image that is asked about, by its identifier or series, or the one that was sent along; the form's fields."""
    if is_uid(image):
        fields = await receive_fields(request)
        return await monai.fetch(request, image), fields
    if image:
        return image, await receive_fields(request)
    found, fields = await monai.scans.add(request)
    return found["image_id"], fields


def _params(text: str) -> dict[str, Any]:
    try:
        params = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise Refused(400, "expected params in JSON", "params") from error
    if not isinstance(params, dict):
        raise Refused(400, "expected params as an object", "params")
    return params


def _session(info: dict[str, Any]) -> dict[str, Any]:
    return {"name": info["image_id"], "image": info["image_id"], "meta": info}


def _answer(monai: Monai, job: Job, output: Output | None) -> Response:
    labels = {name: number for number, name in enumerate(job.options.structures, start=1)}
    facts = {"label_names": labels, "job_id": job.id}
    if output == "json":
        return JSONResponse(facts)
    if output == "dicom_seg":
        return FileResponse(monai.file(job, "segmentation.dcm"), media_type="application/dicom")
    path = monai.file(job, "masks.nii.gz")
    if output == "image":
        return FileResponse(path, media_type="application/gzip", filename=path.name)
    parts = {
        "params": (None, json.dumps(facts), "application/json"),
        "image": (path.name, path.read_bytes(), "application/gzip"),
    }
    content, kind = encode_multipart_formdata(parts)
    return Response(content, media_type=kind)
