"""What an operator can see:

Figures for Prometheus, and one line per request without anything that a patient could be known by.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Sequence

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

log = logging.getLogger("medplib_jax.serve.requests")

MODEL = ("model",)  # label
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class ServerMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self):
        self._registry = CollectorRegistry()
        self._requests = self._make(Counter, "requests", "Answered requests", ("route", "status"))
        self._queue = self._make(Gauge, "queue_length", "Questions that wait for a slot", MODEL)
        self._slots = self._make(Gauge, "slots_busy", "Slots in which an answer is being made", MODEL)
        self._tokens = self._make(Counter, "tokens", "Tokens drawn", MODEL)
        self._first = self._make(Histogram, "first_token_seconds", "From arrival to the first token", MODEL, _SECONDS)
        self._waited = self._make(Histogram, "queue_seconds", "From arrival to a slot", MODEL, _SECONDS)
        memory = self._make(Gauge, "resident_bytes", "Resident memory of the process")
        memory.set_function(lambda: psutil.Process().memory_info().rss)

    def _make(self, kind: type, name: str, about: str, labels: Sequence[str] = (), buckets: Sequence[float] = ()):
        more = {"buckets": buckets} if buckets else {}
        return kind(name, about, labels, namespace="medplib", registry=self._registry, **more)

    def of_engine(self, model: str) -> "EngineMetrics":
        return EngineMetrics(
            *(each.labels(model) for each in (self._queue, self._slots, self._tokens, self._first, self._waited))
        )

    def answered(self, route: str, method: str, status: int, seconds: float, request_id: str) -> None:
        self._requests.labels(route, status).inc()
        line = {"id": request_id, "method": method, "route": route, "status": status, "seconds": round(seconds, 3)}
        log.info(json.dumps(line))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


@dataclasses.dataclass(frozen=True)
class EngineMetrics:
    """The counters of one engine."""

    queue: Gauge
    slots: Gauge
    tokens: Counter
    first: Histogram
    waited: Histogram

    def observe(self, waiting: int, busy: int) -> None:
        self.queue.set(waiting)
        self.slots.set(busy)

    def admitted(self, question) -> None:
        self.waited.observe(time.monotonic() - question.arrived)

    def drew(self, question, tokens: int) -> None:
        """Counts what was drawn since the last call, and the time to the first token."""
        if tokens and not question.shown:
            self.first.observe(time.monotonic() - question.arrived)
        self.tokens.inc(tokens - question.shown)
        question.shown = tokens
