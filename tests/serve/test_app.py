"""What stands around the routes: every request is counted."""

from fastapi import FastAPI
from fastapi.testclient import TestClient

from medplib_jax.serve.app import Noting
from medplib_jax.serve.observe import ServerMetrics


def test_a_request_that_fails_is_counted():
    app, metrics = FastAPI(), ServerMetrics()
    app.add_middleware(Noting, metrics=metrics)

    @app.get("/broken/{name}")
    def broken(name: str):
        raise KeyError(name)

    assert TestClient(app, raise_server_exceptions=False).get("/broken/x").status_code == 500
    assert b'medplib_requests_total{route="/broken/{name}",status="500"} 1.0' in metrics.text()
