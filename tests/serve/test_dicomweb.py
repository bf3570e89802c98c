"""Series of a DICOMweb server: every byte of every file, and nothing but the server that was named."""

import http.server
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from launch.local_multiprocess import free_port
from medplib_jax.serve.dicomweb import DicomWeb, is_uid
from medplib_jax.serve.refusals import Refused
from medplib_jax.volumes.read import read_scan
from tests.volumes.scans import some_values, write_series

ORTHANC, PLUGIN = shutil.which("Orthanc"), Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")

FILES = [b"\0" * 128 + b"DICM" + bytes(range(256)), b"\0" * 128 + b"DICM\r\n\r\n--\r\n", b"x"]


class Archive(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/dicom-web/series?SeriesInstanceUID=1.2.3":
            return self.answer("application/dicom+json", json.dumps([{"0020000D": {"Value": ["1.2"]}}]).encode())
        if self.path.startswith("/dicom-web/series?SeriesInstanceUID=7."):
            return self.answer("application/dicom+json", json.dumps([{"0020000D": {"Value": ["7.2"]}}]).encode())
        if self.path == "/dicom-web/studies/7.2/series/7.3":
            return self.answer("multipart/related; boundary=b0", b"--b0\r\n\r\nwhole\r\n--b0\r\n\r\nbrok")
        if self.path == "/dicom-web/studies/7.2/series/7.4":
            return self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n99\r\n--b0")
        if self.path == "/dicom-web/studies/7.2/series/7.5":
            return self.wfile.write(b"nonsense\r\n")
        if self.path == "/dicom-web/studies/1.2/series/1.2.3":
            parts = [b"--b0\r\nContent-Type: application/dicom\r\n\r\n" + file + b"\r\n" for file in FILES]
            return self.answer('multipart/related; type="application/dicom"; boundary=b0', b"".join(parts) + b"--b0--")
        if self.path.endswith("=9.9"):
            return self.answer("text/html", b"<p>broken")
        return self.answer("application/dicom+json", b"[]")

    def answer(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Archive) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/dicom-web/"
        server.shutdown()


def test_the_files_of_a_series_are_written(url, tmp_path):
    DicomWeb(url, 10_000).fetch("1.2.3", tmp_path)
    assert [(tmp_path / str(number)).read_bytes() for number in range(3)] == FILES
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("series", "most", "status"),
    [("4.5", 9999, 404), ("9.9", 9999, 502), ("1.2.3", 10, 413), *[(f"7.{k}", 9999, 502) for k in (3, 4, 5)]],
)
def test_what_cannot_be_fetched_is_refused(url, tmp_path, series, most, status):
    with pytest.raises(Refused) as found:
        DicomWeb(url, most).fetch(series, tmp_path)
    assert found.value.status == status


def test_a_server_that_does_not_answer_is_named(tmp_path):
    with pytest.raises(Refused, match="does not answer"):
        DicomWeb("http://127.0.0.1:9", 99).fetch("1.2", tmp_path)
    with pytest.raises(ValueError, match="expected http"):
        DicomWeb("file:///etc/passwd", 99)


@pytest.mark.parametrize("text", ["", "1", "1.2/../3", "1.2?x=1", "a.b", "1." * 40, "0" * 32, "1.2\n"])
def test_only_identifiers_are_series(text):
    assert not is_uid(text) and is_uid("1.2.840.10008")


@pytest.fixture
def orthanc(tmp_path):
    """A real archive, empty."""
    port = free_port()
    content = {"HttpPort": port, "DicomServerEnabled": False, "AuthenticationEnabled": False}
    content |= {
        "StorageDirectory": str(tmp_path / "db"),
        "IndexDirectory": str(tmp_path / "db"),
        "Plugins": [str(PLUGIN)],
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(content))
    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen([ORTHANC, tmp_path / "orthanc.json"], stdout=file, stderr=file) as process,
    ):
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not _answers(url):
            time.sleep(0.1)
        yield url
        process.terminate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/system").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.skipif(not (ORTHANC and PLUGIN.exists()), reason="Debian: apt-get install orthanc orthanc-dicomweb")
def test_a_series_of_orthanc_is_the_one_that_was_stored(orthanc, tmp_path):
    made = write_series(tmp_path / "scan", some_values((12, 14, 6)))
    for path in (tmp_path / "scan").iterdir():
        assert httpx.post(f"{orthanc}/instances", content=path.read_bytes()).status_code == 200
    (tmp_path / "fetched").mkdir()
    DicomWeb(f"{orthanc}/dicom-web", 10**8).fetch(str(made[0].SeriesInstanceUID), tmp_path / "fetched")
    found, expected = (read_scan(str(tmp_path / name)) for name in ("fetched", "scan"))
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.affine, expected.affine)
    with pytest.raises(Refused, match="no such series"):
        DicomWeb(f"{orthanc}/dicom-web", 10**8).fetch("1.2.3", tmp_path / "fetched")
