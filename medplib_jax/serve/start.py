"""From a checkpoint's folder to the application."""

import argparse
from collections.abc import Sequence

from fastapi import FastAPI

from medplib_jax.parallel.compilation import use_cache
from medplib_jax.serve.app import Limits, make_app
from medplib_jax.serve.engine import Engine
from medplib_jax.serve.model import load_model
from medplib_jax.serve.observe import EngineMetrics

CHUNK = 8  # tokens between two looks at the queue
CACHE_BYTES = 2**30  # of pictures' features


def build(arguments: argparse.Namespace, keys: Sequence[str], hosts: Sequence[str]) -> FastAPI:
    """The application for the command line's arguments.

    ValueError or OSError for a checkpoint that cannot be served.
    """
    use_cache()
    model = load_model(arguments.checkpoint, arguments.quantize, arguments.max_new_tokens, arguments.mask_threshold)
    engine = Engine(
        model.generator,
        EngineMetrics(),
        longest=model.longest,
        slots=arguments.slots,
        refill=max(1, arguments.slots // 2),
        chunk=CHUNK,
        capacity=arguments.queue,
        cache_bytes=CACHE_BYTES,
    )
    return make_app(model, engine, keys, hosts, Limits())
