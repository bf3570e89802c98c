"""Scans that clients send: a raw body, a ZIP archive, or the files of a form; written under names of our own.

What a client calls a file decides nothing but its suffix, if that is one of `SUFFIXES`: names may hold a patient's
name, or a way out of the folder.
"""

import zipfile
from pathlib import Path

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from medplib_jax.serve.refusals import Refused
from medplib_jax.volumes.formats import SUFFIXES

MAX_FILES = 4096
MAX_UNPACKED = 2**31  # bytes of all files of an archive
_STEP = 2**20
_ITK_TEXT = (b"ObjectType", b"NDims")


async def receive(request: Request, folder: Path) -> dict[str, str]:
    """Writes what a request brings into the folder, and returns the other fields of its form.

    Refused: forms and archives that cannot be read, too many files or bytes.
    """
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await _receive_form(request, folder)
    target = folder / "0"
    with target.open("wb") as file:
        async for chunk in request.stream():
            file.write(chunk)
    return {}


async def receive_fields(request: Request) -> dict[str, str]:
    """The fields of a form; its files are left out."""
    form = await _form(request)
    await form.close()
    return {name: value for name, value in form.multi_items() if isinstance(value, str)}


async def _form(request: Request) -> FormData:
    try:
        return await request.form(max_files=MAX_FILES, max_fields=64)
    except HTTPException as error:
        raise Refused(400, f"the form cannot be read: {error.detail}") from error


async def _receive_form(request: Request, folder: Path) -> dict[str, str]:
    form = await _form(request)
    fields, count = {}, 0
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                with (folder / str(count)).open("wb") as file:
                    while chunk := await value.read(_STEP):
                        file.write(chunk)
                count += 1
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields


def unpack(folder: Path) -> None:
    """Turns what was received into files that `read_scan` knows: archives are unpacked, suffixes follow the content.

    Refused: nothing at all, and what is too large once it is unpacked.
    """
    received = sorted(folder.iterdir(), key=lambda path: int(path.name))
    if not any(path.stat().st_size for path in received):
        raise Refused(400, "expected a scan in the body, found nothing")
    for path in received:
        with path.open("rb") as file:
            start = file.read(400)
        if start[:4] == b"PK\x03\x04":
            _unzip(path, folder)
            path.unlink()
        elif suffix := _suffix(start):
            path.rename(path.with_name(f"{path.name}{suffix}"))


def _suffix(start: bytes) -> str:
    """By the first bytes of a file; "" for DICOM and whatever is not known."""
    if start[:2] == b"\x1f\x8b":
        return ".nii.gz"
    if start[344:347] == b"n+1" or start[4:7] == b"n+2":
        return ".nii"
    if start[:4] == b"NRRD":
        return ".nrrd"
    return ".mha" if start.startswith(_ITK_TEXT) else ""


def _unzip(path: Path, folder: Path) -> None:
    """Writes the files of an archive side by side, counting bytes as they come: what a header promises may be a lie."""
    room = MAX_UNPACKED
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > MAX_FILES:
                raise Refused(413, f"the archive has more than {MAX_FILES} files")
            for number, member in enumerate(members):
                suffix = next((end for end in SUFFIXES if member.filename.lower().endswith(end)), "")
                target = folder / f"{path.name}-{number}{suffix}"
                with archive.open(member) as source, target.open("wb") as file:
                    while chunk := source.read(_STEP):
                        room -= len(chunk)
                        if room < 0:
                            raise Refused(413, f"the archive unpacks to more than {MAX_UNPACKED} bytes")
                        file.write(chunk)
    except Refused:
        raise
    except Exception as error:  # broken archives raise errors of many types
        raise Refused(400, "the archive cannot be read") from error
