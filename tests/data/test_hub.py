"""Folders on the hub, against a small server that answers as the hub does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from medplib_jax.data.hub import local
from tests.paths import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "flax_model.msgpack": b"others"}


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, owner/model, of one commit with the tag v1."""

    asked: list[str] = []

    def do_HEAD(self):
        self._answer(head=True)

    def do_GET(self):
        self._answer()

    def _answer(self, head=False):
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        body, headers = b"", {}
        if parts[:5] == ["api", "models", "owner", "model", "tree"]:
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            body = json.dumps(files).encode()
        elif parts[:4] == ["api", "models", "owner", "model"] and parts[-1] in ("v1", COMMIT):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "owner/model", "modelId": "owner/model", "sha": COMMIT, "siblings": siblings})
            body = body.encode()
        elif parts[:2] == ["owner", "model"] and parts[3] in ("v1", COMMIT) and parts[-1] in FILES:
            body = FILES[parts[-1]]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        self.send_response(200 if body else 404)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if head else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """The environment of a program that finds this server instead of the hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()


def ask(environment, name):
    program = f"from medplib_jax.data.hub import local; print(local({name!r}))"
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


def test_a_repository_is_a_folder_that_is_filled_once(hub):
    found = ask(hub, "hf://owner/model@v1")
    assert found.returncode == 0, found.stderr
    folder = found.stdout.splitlines()[-1]
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"] and COMMIT in folder
    assert open(f"{folder}/config.json", "rb").read() == FILES["config.json"]
    Hub.asked.clear()
    assert ask(hub, f"hf://owner/model@{COMMIT}").stdout.splitlines()[-1] == folder
    assert not [path for path in Hub.asked if path.endswith("model.safetensors")]


def test_what_cannot_be_had_is_named(hub):
    error = ask(hub, "hf://owner/gone@v1").stderr.strip().splitlines()[-1]
    assert error.startswith("FileNotFoundError: hf://owner/gone@v1: ")


def test_a_command_line_says_in_one_line_what_is_wrong(hub):
    command = [sys.executable, "-m", "convert.from_torch", "--source", "hf://owner/model", "--out", "x"]
    done = subprocess.run(command, env=hub, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "argument --source: hf://owner/model: expected hf://OWNER/NAME@REVISION" in done.stderr


def test_other_paths_stay_and_a_revision_is_needed():
    assert local("runs/demo") == "runs/demo" and local("gs://bucket/runs") == "gs://bucket/runs"
    for name in ("hf://owner/model", "hf://model@v1", "hf://owner/model@", "hf://owner/model/more@v1"):
        with pytest.raises(ValueError, match="expected hf://OWNER/NAME@REVISION"):
            local(name)
