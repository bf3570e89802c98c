"""What an operator can see:

Figures for Prometheus, and one line per request without anything that a patient could be known by.
"""

import json
import logging
import time

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

log = logging.getLogger("medplib_jax.serve.requests")

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class EngineMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self):
        self._registry = CollectorRegistry()
        named = {"namespace": "medplib", "registry": self._registry}
        self._queue = Gauge("queue_length", "Questions that wait for a slot", **named)
        self._slots = Gauge("slots_busy", "Slots in which an answer is being made", **named)
        self._tokens = Counter("tokens", "Tokens drawn", **named)
        self._first = Histogram("first_token_seconds", "From arrival to the first token", buckets=_SECONDS, **named)
        self._waited = Histogram("queue_seconds", "From arrival to a slot", buckets=_SECONDS, **named)
        self._requests = Counter("requests", "Answered requests", ("route", "status"), **named)
        self._memory = Gauge("resident_bytes", "Resident memory of the process", **named)
        self._memory.set_function(lambda: psutil.Process().memory_info().rss)

    def observe(self, waiting: int, busy: int) -> None:
        self._queue.set(waiting)
        self._slots.set(busy)

    def admitted(self, question) -> None:
        self._waited.observe(time.monotonic() - question.arrived)

    def drew(self, question, tokens: int) -> None:
        """Counts what was drawn since the last call, and the time to the first token."""
        if tokens and not question.shown:
            self._first.observe(time.monotonic() - question.arrived)
        self._tokens.inc(tokens - question.shown)
        question.shown = tokens

    def answered(self, route: str, method: str, status: int, seconds: float, request_id: str) -> None:
        self._requests.labels(route, status).inc()
        line = {"id": request_id, "method": method, "route": route, "status": status, "seconds": round(seconds, 3)}
        log.info(json.dumps(line))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
