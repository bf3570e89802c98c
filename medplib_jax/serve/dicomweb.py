"""Series of a DICOMweb server (QIDO-RS, WADO-RS), such as Orthanc, by their SeriesInstanceUID."""

import http.client
import json
import mmap
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

from medplib_jax.serve.refusals import Refused

SECONDS = 120.0
_STEP = 2**20
_STUDY = "0020000D"  # StudyInstanceUID
_UID = re.compile(r"\d+(\.\d+)+")


def is_uid(text: str) -> bool:
    return len(text) <= 64 and bool(_UID.fullmatch(text))


class DicomWeb:
    """The one server that whoever started this one has named; requests choose a series of it, no address."""

    def __init__(self, url: str, most_bytes: int):
        if not re.match(r"https?://", url):
            raise ValueError(f"--dicomweb {url}: expected http://... or https://...")
        self._url, self._most = url.rstrip("/"), most_bytes

    def fetch(self, series: str, folder: Path) -> None:
        """Writes the files of a series into the folder. Refused: no such series, too many bytes, no answer."""
        with self._open(f"series?{urlencode({'SeriesInstanceUID': series})}", "application/dicom+json") as response:
            content = _read(response)
        try:
            found = json.loads(content or b"[]")
            study = str(found[0][_STUDY]["Value"][0]) if found else ""
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise Refused(502, "the DICOMweb server's answer cannot be read") from error
        if not is_uid(study):
            raise Refused(404, "the DICOMweb server has no such series", "image")
        kind = 'multipart/related; type="application/dicom"'
        whole = folder / ".whole"
        with self._open(f"studies/{study}/series/{series}", kind) as response, whole.open("wb") as file:
            boundary = re.search(r'boundary="?([^";]+)', response.headers.get("Content-Type", ""))
            while chunk := _read(response):
                file.write(chunk)
                if file.tell() > self._most:
                    raise Refused(413, f"the series has more than {self._most} bytes", "image")
        if not boundary or not whole.stat().st_size:
            raise Refused(502, "the DICOMweb server's answer cannot be read")
        for number, part in enumerate(_parts(whole, boundary[1].encode())):
            (folder / str(number)).write_bytes(part)
        whole.unlink()

    def _open(self, path: str, kind: str):
        request = urllib.request.Request(f"{self._url}/{path}", headers={"Accept": kind})
        try:
            return urllib.request.urlopen(request, timeout=SECONDS)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Refused(502, "the DICOMweb server does not answer") from error


def _read(response: http.client.HTTPResponse) -> bytes:
    """The next bytes of an answer, b"" at its end."""
    try:
        return response.read(_STEP)
    except (OSError, http.client.HTTPException) as error:
        raise Refused(502, "the DICOMweb server's answer breaks off") from error


def _parts(path: Path, boundary: bytes) -> Iterator[bytes]:
    """The bodies of a multipart file, one in memory at a time. Refused when the mark of its end is missing."""
    mark = b"--" + boundary
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(mark)
        while (end := content.find(mark, start + 1)) >= 0:
            body = content.find(b"\r\n\r\n", start, end)
            if body >= 0:
                yield content[body + 4 : end - 2]  # behind the headers, before the line of the next mark
            start = end
        if content[start + len(mark) : start + len(mark) + 2] != b"--":
            raise Refused(502, "the DICOMweb server's answer breaks off")
