"""Trials of minutes: many clients at once, a server that is killed, and thousands of broken requests."""

import collections
import concurrent.futures
import json
import random
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from tests.serve.conftest import MAX_NEW_TOKENS, running
from tests.serve.test_chat import QUESTIONS, messages
from tests.volumes.scans import some_values, write_nifti

pytestmark = pytest.mark.slow
DONE = {"status": "done"}
DOCUMENTED = {200, 400, 401, 404, 405, 408, 413, 422, 429}


def ask(url: str, body: dict, seconds: float = 120) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=seconds)


def bodies(count: int) -> list[dict]:
    return [
        {"messages": messages(number % 7, QUESTIONS[number % len(QUESTIONS)]), "max_tokens": 4 + 4 * (number % 6)}
        for number in range(count)
    ]


def test_many_clients_for_two_minutes(server):
    asked = bodies(42)
    alone = [ask(server.url, body).json()["choices"][0]["message"] for body in asked]
    began = time.monotonic()
    for body in asked[:10]:
        ask(server.url, body)
    one_client = 10 / (time.monotonic() - began)
    process, memory, found = psutil.Process(server.process.pid), [], collections.Counter()
    end = time.monotonic() + 120

    def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            chosen = draw.randrange(len(asked))
            answer = ask(server.url, asked[chosen])
            if answer.status_code == 429:
                found["busy"] += 1
                assert int(answer.headers["Retry-After"]) >= 1
                continue
            assert answer.status_code == 200
            found["right" if answer.json()["choices"][0]["message"] == alone[chosen] else "wrong"] += 1
            memory.append(process.memory_info().rss)

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        list(pool.map(client, range(64)))
    print(f"\n{dict(found)}; {found['right'] / 120:.1f} answers/s beside {one_client:.1f} of one client")
    quarter = len(memory) // 4
    second, last = (sum(part) / len(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    print(f"memory {second / 1e6:.0f} MB in the second quarter, {last / 1e6:.0f} MB in the last")
    assert found["wrong"] == 0 and found["right"] > 0
    assert last <= 1.03 * second


def test_a_killed_server_starts_again(workdir, tmp_path):
    for trial in range(3):
        with running(workdir, tmp_path / f"{trial}.txt", "--max-new-tokens", str(MAX_NEW_TOKENS)) as server:
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                waiting = [pool.submit(ask, server.url, body) for body in bodies(8)]
                time.sleep(random.Random(trial).random())
                server.process.send_signal(signal.SIGKILL)
                server.process.wait()
                for one in waiting:
                    error = one.exception()
                    assert error is None or isinstance(error, httpx.TransportError)
    with running(workdir, tmp_path / "last.txt", "--max-new-tokens", str(MAX_NEW_TOKENS)) as server:
        assert ask(server.url, bodies(1)[0]).status_code == 200


def test_jobs_survive_twenty_kills(workdir, tmp_path):
    """A finished job is whole after each kill, an unfinished one goes on; none is lost."""
    write_nifti(tmp_path / "scan.nii.gz", some_values((12, 14, 12)))
    jobs, kept, log = [], {}, tmp_path / "kept.txt"
    for trial in range(21):
        with running(workdir, log, "--max-new-tokens", "24") as server, httpx.Client(base_url=server.url) as client:
            for job in kept:
                assert client.get(f"/jobs/{job}").json()["status"] == "done"
                assert client.get(f"/jobs/{job}/result").content == kept[job]
            assert client.get("/healthz").status_code == 200
            if trial == 20:
                for job in jobs:
                    assert json.loads(client.get(f"/jobs/{job}/events", timeout=300).text.splitlines()[-1]) == DONE
                break
            image = client.post("/images", content=(tmp_path / "scan.nii.gz").read_bytes(), timeout=60).json()[
                "image_id"
            ]
            asked = {"image_id": image, "prompts": ["lung"], "question": "Where is the {structure}?"}
            jobs += [client.post("/jobs", json=asked).json()["job_id"] for _ in range(2)]
            time.sleep(random.Random(trial).random())
            for job in jobs:
                if job not in kept and client.get(f"/jobs/{job}").json()["status"] == "done":
                    kept[job] = client.get(f"/jobs/{job}/result").content
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
    print(f"\n{len(kept)} of {len(jobs)} jobs were finished before the last kill")


def mutated(draw: random.Random) -> bytes:
    """A request with something wrong: a changed field, a changed byte, or no request at all."""
    body = bodies(12)[draw.randrange(12)]
    body["max_tokens"] = 1
    odd = [None, -1, 1e400, "x", [], {}, True, "\0", 2**70, [[]], {"a": {}}]
    if draw.random() < 0.7:
        field = draw.choice(
            ["messages", "model", "temperature", "top_p", "seed", "stop", "stream", "regions", "max_tokens"]
        )
        body[field] = draw.choice(odd)
    content = bytearray(json.dumps(body).encode())
    if draw.random() < 0.5:
        for _ in range(draw.randrange(1, 5)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content[: draw.randrange(len(content))] if draw.random() < 0.1 else content)


def test_thousands_of_broken_requests(server):
    def send(number: int) -> int:
        content = mutated(random.Random(number))
        headers = {"Content-Type": "application/json"}
        return httpx.post(
            f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=120
        ).status_code

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = collections.Counter(pool.map(send, range(5000)))
    print(f"\n{dict(found)}")
    assert found.keys() <= DOCUMENTED and server.process.poll() is None
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_schemathesis_finds_no_server_error(server, tmp_path):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--url", server.url]
    command += ["--checks", "not_a_server_error", "--max-examples", "60", "--exclude-path", "/metrics"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
