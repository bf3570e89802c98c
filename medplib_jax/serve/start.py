"""From checkpoints' folders to the application."""

import argparse
import glob
import os
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import jax
from fastapi import FastAPI

from medplib_jax.parallel.compilation import use_cache
from medplib_jax.serve.app import Limits, Served, make_app
from medplib_jax.serve.dicomweb import DicomWeb
from medplib_jax.serve.engine import Engine
from medplib_jax.serve.model import load_model
from medplib_jax.serve.observe import ServerMetrics
from medplib_jax.serve.store import Bounds, Store

CHUNK = 8  # tokens between two looks at the queue
EXAMPLES = 8
CACHE_BYTES = 2**30  # of pictures' features, for each model


def build(arguments: argparse.Namespace, keys: Sequence[str], hosts: Sequence[str]) -> FastAPI:
    """The application for the command line's arguments.

    ValueError or OSError for a checkpoint that cannot be served.
    """
    use_cache()
    metrics = ServerMetrics()
    served = [_serve(path, name, arguments, metrics) for path, name in named(arguments.checkpoint).items()]
    limits = Limits(kept=Bounds(bytes=int(arguments.keep_gb * 1e9), hours=arguments.keep_hours))
    structures = [name.strip() for name in arguments.structures.split(";") if name.strip()]
    store = Store(Path(arguments.store), limits.kept)
    if arguments.open:
        url = f"http://127.0.0.1:{arguments.port}/"
        threading.Thread(target=_open_page, args=(served[0].engine, url), daemon=True).start()
    source = DicomWeb(arguments.dicomweb, limits.upload.bytes) if arguments.dicomweb else None
    return make_app(served, store, metrics, keys, hosts, structures, source, _examples(arguments.examples), limits)


def _open_page(engine: Engine, url: str) -> None:
    engine.ready.wait()
    webbrowser.open(url)


def _examples(pattern: str | None) -> list[Path]:
    """Pictures of a folder, or whose paths match a pattern; `EXAMPLES` of them, spread evenly. ValueError for none."""
    if not pattern:
        return []
    paths = glob.glob(os.path.join(pattern, "*") if os.path.isdir(pattern) else pattern)
    found = sorted(Path(path) for path in paths if path.lower().endswith((".png", ".jpg", ".jpeg")))
    if not found:
        raise ValueError(f"--examples {pattern}: expected PNG or JPEG pictures, found none")
    return found[:: max(1, len(found) // EXAMPLES)][:EXAMPLES]


def named(paths: Sequence[str]) -> dict[str, str]:
    """What clients call each checkpoint: its folder's name, with the folder's above where two would be the same.

    ValueError for one that is given twice.
    """
    whole = [os.path.abspath(path) for path in paths]
    if len(set(whole)) < len(whole):
        raise ValueError(f"--checkpoint: expected different ones, found {', '.join(paths)}")
    parts = [path.strip(os.sep).split(os.sep) for path in whole]
    deep = 1
    while len({tuple(each[-deep:]) for each in parts}) < len(parts):
        deep += 1
    return {path: "/".join(each[-deep:]) for path, each in zip(paths, parts, strict=True)}


def prompts_together() -> int:
    """Prompts that one program runs.

    Always as many, so that no answer depends on who else asks. A CPU's time is that of the rows, fillers too.
    """
    return 1 if jax.default_backend() == "cpu" else 4


def _serve(path: str, name: str, arguments: argparse.Namespace, metrics: ServerMetrics) -> Served:
    model = load_model(path, name, arguments.quantize, arguments.max_new_tokens, arguments.mask_threshold)
    engine = Engine(
        model.generator,
        metrics.of_engine(name),
        longest=model.longest,
        slots=arguments.slots,
        refill=max(1, arguments.slots // 2),
        together=prompts_together(),
        chunk=CHUNK,
        capacity=arguments.queue,
        cache_bytes=CACHE_BYTES,
    )
    return Served(model, engine)
