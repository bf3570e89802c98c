"""Scans that clients send: a raw body, a ZIP archive, or the files of a form; written under names of our own.

What a client calls a file decides nothing but its suffix, if that is one of `SUFFIXES`: names may hold a patient's
name, or a way out of the folder.
"""

import mmap
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from medplib_jax.serve.refusals import Refused
from medplib_jax.volumes.formats import ITK, SUFFIXES

MAX_FILES = 4096
MAX_UNPACKED = 2**31  # bytes of all files of all archives
_STEP = 2**20
_ITK_TEXT = (b"ObjectType", b"NDims")
_DATA_FILE = re.compile(rb"(element)?data ?file\s*[:=]?\s*([^\r\n]*)", re.IGNORECASE)  # of a MetaImage or NRRD header


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

    Refused: nothing at all, what is too large once it is unpacked, and headers that name other files.
    """
    received = sorted(folder.iterdir(), key=lambda path: int(path.name))
    if not any(path.stat().st_size for path in received):
        raise Refused(400, "expected a scan in the body, found nothing")
    archives = []
    for path in received:
        with path.open("rb") as file:
            start = file.read(400)
        if start[:4] == b"PK\x03\x04":
            archives.append(path)
        elif suffix := _suffix(start):
            path.rename(path.with_name(f"{path.name}{suffix}"))
    _unzip(archives, folder)
    for path in folder.iterdir():
        if path.name.endswith(ITK):
            _check_own_voxels(path)


def _suffix(start: bytes) -> str:
    """By the first bytes of a file; "" for DICOM and whatever is not known."""
    if start[:2] == b"\x1f\x8b":
        return ".nii.gz"
    if start[344:347] == b"n+1" or start[4:7] == b"n+2":
        return ".nii"
    if start[:4] == b"NRRD":
        return ".nrrd"
    return ".mha" if start.startswith(_ITK_TEXT) else ""


def _check_own_voxels(path: Path) -> None:
    """Refused: a MetaImage or NRRD file whose header names a file of voxels, which could be any file of this machine.

    The whole file is searched: where its header ends is for its reader to say.
    """
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if any(not found[1] or found[2].strip().lower() != b"local" for found in _DATA_FILE.finditer(content)):
            raise Refused(400, "expected the voxels behind their header, found a header that names another file")


def _unzip(archives: Iterable[Path], folder: Path) -> None:
    """Writes the files of all archives side by side in their place.

    Bytes are counted as they come: what a header promises may be a lie.
    """
    room, files = MAX_UNPACKED, 0
    try:
        for path in archives:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                files += len(members)
                if files > MAX_FILES:
                    raise Refused(413, f"the archives have more than {MAX_FILES} files")
                for number, member in enumerate(members):
                    suffix = next((end for end in SUFFIXES if member.filename.lower().endswith(end)), "")
                    room -= _write(archive, member, folder / f"{path.name}-{number}{suffix}", room)
            path.unlink()
    except Refused:
        raise
    except Exception as error:  # broken archives raise errors of many types
        raise Refused(400, "the archive cannot be read") from error


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, room: int) -> int:
    """Writes a file of an archive; its bytes. Refused: more than there is `room` for."""
    size = 0
    with archive.open(member) as source, target.open("wb") as file:
        while chunk := source.read(_STEP):
            size += len(chunk)
            if size > room:
                raise Refused(413, f"the archives unpack to more than {MAX_UNPACKED} bytes")
            file.write(chunk)
    return size
