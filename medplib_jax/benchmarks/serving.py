"""A server under load: answers checked against `predict`, throughput beside one client's, first tokens, memory.

CPU time stands beside wall time, and the server's own beside that of the clients, which share the cores with it.

COMMAND
    python -m medplib_jax.benchmarks.serving --checkpoint runs/demo/stage_IV \\
        --pictures "runs/demo/phantom/images/*--test_*" [--clients 64] [--seconds 120]

Starts the server itself and talks to it over loopback. Exit status 1 when an answer is lost, doubled or another one.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import glob
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from medplib_jax.decode.predictor import Predictor
from medplib_jax.parallel.compilation import use_cache

QUESTIONS = (
    "Please segment the liver in this image.",
    "What can you see in this image?",
    "Is there a tumor in this image?",
    "Please segment the kidney and the spleen in this image.",
)
MAX_NEW_TOKENS = 64
PICTURES = 8  # that are asked about under load
FIRST_TOKENS, COMPILING = 32, 2  # pictures whose first tokens are timed, and how many of them while programs compile


@contextlib.contextmanager
def server(checkpoint: str) -> Iterator[tuple[str, psutil.Process]]:
    """Where a server of its own process listens, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as store, open(Path(store, "log"), "w") as log:
        command = [sys.executable, "-m", "medplib_jax.serve", "--checkpoint", checkpoint, "--port", str(port)]
        command += ["--store", store, "--max-new-tokens", str(MAX_NEW_TOKENS)]
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                while process.poll() is None:
                    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/healthz", timeout=5):
                        break
                    time.sleep(0.2)
                else:
                    raise RuntimeError(Path(store, "log").read_text())
                yield url, psutil.Process(process.pid)
            finally:
                process.terminate()


def body_of(picture: str, question: str, **more) -> bytes:
    url = "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return json.dumps({"messages": [{"role": "user", "content": content}], **more}).encode()


def post(url: str, body: bytes):
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=300)


def text_of(url: str, body: bytes) -> str | None:
    """The answer; None when the server was too busy to take the question."""
    try:
        with post(url, body) as response:
            return json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        if error.code != 429:
            raise
        time.sleep(int(error.headers["Retry-After"]))
        return None


def figure(url: str, name: str) -> float:
    """One of the server's own figures."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        return sum(float(line.split()[-1]) for line in response.read().decode().splitlines() if line.startswith(name))


def first_token_seconds(url: str, body: bytes) -> float:
    """From the request to the first event with text, or to the end of an empty answer."""
    began = time.monotonic()
    with post(url, body) as response:
        for line in response:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                break
        took = time.monotonic() - began
        response.read()
    return took


def first_tokens(url: str, process: psutil.Process, pictures: Sequence[str]) -> dict[str, float]:
    """Seconds to the first token of the first and the second question about a picture, asked one at a time.

    Medians in all and in the engine; the server's CPU time (which comes in hundredths of a second) is a mean.
    """
    name, rows = "medplib_first_token_seconds_sum", ([], [])
    for picture in pictures[:FIRST_TOKENS]:
        for place, question in zip(rows, QUESTIONS, strict=False):
            before, cpu = figure(url, name), cpu_seconds(process)
            took = first_token_seconds(url, body_of(picture, question, stream=True))
            cpu = cpu_seconds(process) - cpu
            place.append((took, figure(url, name) - before, cpu))
    found = {}
    for which, place in zip(("first", "again"), rows, strict=True):
        took, inside, cpu = zip(*place[COMPILING:], strict=True)
        found |= {f"{which}.seconds": statistics.median(took), f"{which}.in_engine": statistics.median(inside)}
        found |= {f"{which}.server_cpu": statistics.mean(cpu)}
    return found | {"again_over_first": found["again.seconds"] / found["first.seconds"]}


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def rate(
    url: str, process: psutil.Process, bodies: Sequence[bytes], expected: Sequence[str], clients: int, seconds: float
) -> dict:
    """What so many clients at once get in that time: answers by kind and per second, what each waited and cost."""
    end, waited, found = time.monotonic() + seconds, [], {"right": 0, "wrong": 0, "busy": 0}
    server_cpu, own_cpu = cpu_seconds(process), time.process_time()

    def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            chosen, began = draw.randrange(len(bodies)), time.monotonic()
            text = text_of(url, bodies[chosen])
            if text is not None:
                waited.append(time.monotonic() - began)
            found["busy" if text is None else "right" if text == expected[chosen] else "wrong"] += 1

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    waited.sort()
    return found | {
        "per_second": found["right"] / seconds,
        "server_cpu_seconds": (cpu_seconds(process) - server_cpu) / len(waited),
        "clients_cpu_seconds": (time.process_time() - own_cpu) / len(waited),
        "p50_seconds": waited[len(waited) // 2],
        "p99_seconds": waited[int(0.99 * len(waited))],
    }


def memory_during(process: psutil.Process, run) -> tuple[dict, float]:
    """What `run` returns, and the mean memory of its last quarter over that of its second one."""
    samples: list[int] = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        going = pool.submit(run)
        while not going.done():
            samples.append(process.memory_info().rss)
            time.sleep(0.25)
    quarter = len(samples) // 4
    return going.result(), statistics.mean(samples[-quarter:]) / statistics.mean(samples[quarter : 2 * quarter])


def measure(checkpoint: str, pictures: Sequence[str], clients: int, seconds: float) -> dict[str, float]:
    predictor = Predictor(checkpoint, max_new_tokens=MAX_NEW_TOKENS)
    asked = [(picture, question) for picture in pictures[:PICTURES] for question in QUESTIONS]
    expected = [predictor(picture, question).answer for picture, question in asked]
    bodies = [body_of(picture, question) for picture, question in asked]
    with server(checkpoint) as (url, process):
        tokens = first_tokens(url, process, pictures)
        one = rate(url, process, bodies, expected, 1, seconds / 4)
        many, growth = memory_during(process, lambda: rate(url, process, bodies, expected, clients, seconds))
    found = {f"one.{name}": value for name, value in one.items()} | {f"many.{n}": value for n, value in many.items()}
    ratio = many["per_second"] / one["per_second"]
    return tokens | found | {"many_over_one": ratio, "memory_last_over_second_quarter": growth}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--pictures", required=True, metavar="PATTERN")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    use_cache()
    pictures = sorted(glob.glob(arguments.pictures))
    if len(pictures) < FIRST_TOKENS:
        sys.exit(
            f"error: --pictures {arguments.pictures}: expected at least {FIRST_TOKENS} files, found {len(pictures)}"
        )
    found = measure(arguments.checkpoint, pictures, arguments.clients, arguments.seconds)
    for name, value in found.items():
        print(f"{name:34} {value:.3f}")
    return 1 if found["one.wrong"] + found["many.wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
