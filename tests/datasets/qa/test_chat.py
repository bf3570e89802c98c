"""The chat client against an endpoint that fails, stalls and returns nonsense."""

import concurrent.futures
import json
import threading

import pytest

from medplib_jax.datasets.qa import chat
from tests.datasets.qa.server import completion, serve

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
LATER = "Thu, 01 Jan 1970 00:00:00 GMT"  # in the past: no wait


def client(server, tmp_path, **changes) -> chat.Chat:
    return chat.Chat(
        chat.Endpoint(server.url, "m", **{"backoff": 0.0, "timeout": 60.0} | changes), str(tmp_path / "answers")
    )


def hang_up(handler):
    handler.close_connection = True
    handler.connection.close()


def half_a_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def stop_in_the_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.stall()


FAILURES = {
    "HTTP 500": lambda handler: handler.reply(b"oops", 500),
    "HTTP 503": lambda handler: handler.reply(b"loading", 503, Retry_After="0"),
    "HTTP 429": lambda handler: handler.reply(b"slow down", 429, Retry_After=LATER),
    "no answer in time": lambda handler: handler.stall(),
    "no answer in time, begun": stop_in_the_body,
    "connection failed": hang_up,
    "connection failed, begun": half_a_body,
    "not a chat completion": lambda handler: handler.reply(b"<html>It works!</html>"),
    "not a chat completion, empty": lambda handler: handler.reply(b""),
    "not a chat completion, a list": lambda handler: handler.reply(b"[1, 2]"),
    "not a chat completion, other keys": lambda handler: handler.reply(b'{"choices": []}'),
    "not a chat completion, not a text": lambda handler: handler.reply(
        b'{"choices": [{"message": {"content": {"a": 1}}}]}'
    ),
    "not a chat completion, endless tokens": lambda handler: handler.reply(
        b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": Infinity}}'
    ),
    "not a chat completion, deep": lambda handler: handler.reply(b"[" * 100_000),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_may_pass_is_tried_again_and_counted(tmp_path, name):
    with serve(lambda handler, messages, number: FAILURES[name](handler) if number < 2 else "Hi.") as server:
        asked = client(server, tmp_path, timeout=0.5 if "in time" in name else 60.0)
        assert asked.ask(MESSAGES) == "Hi."
    ((kind, count),) = asked.failures().items()
    assert kind == name.split(",")[0] and asked.counts["answers_paid"] == 1 and len(server.requests) == count + 1
    assert count == 2 or "in time" in name  # a busy machine may answer late, too


def test_every_try_fails(tmp_path):
    with serve(lambda handler, messages, number: handler.reply(b"down", 502)) as server:
        asked = client(server, tmp_path)
        with pytest.raises(chat.NoAnswer, match="7 tries; the last: HTTP 502"):
            asked.ask(MESSAGES)
    assert len(server.requests) == chat.TRIES and asked.counts["answers_paid"] == 0


def test_a_request_that_is_refused_is_not_tried_again(tmp_path):
    with (
        serve(lambda handler, messages, number: handler.reply(b"too long", 400)) as server,
        pytest.raises(chat.NoAnswer, match="HTTP 400: too long"),
    ):
        client(server, tmp_path).ask(MESSAGES)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_ends_everything(tmp_path, status):
    with (
        serve(lambda handler, messages, number: handler.reply(b"no", status)) as server,
        pytest.raises(chat.EndpointError, match=f"HTTP {status}: no"),
    ):
        client(server, tmp_path).ask(MESSAGES)
    assert len(server.requests) == 1


def test_an_answer_that_trickles_ends_at_the_deadline(tmp_path):
    def trickle(handler, messages, number):
        handler.send_response(200)
        handler.end_headers()
        while not handler.server.closing.wait(0.05):
            handler.wfile.write(b" ")

    with serve(trickle) as server:
        asked = client(server, tmp_path, timeout=0.2)
        with pytest.raises(chat.NoAnswer, match="no answer in time"):
            asked.ask(MESSAGES)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("3", 3.0),
        ("99999999", chat.LONGEST_WAIT),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        (None, None),
    ],
)
def test_the_server_says_how_long_to_wait(header, expected):
    assert chat._seconds(header) == expected


def test_waits_follow_the_server_or_grow(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda event, seconds=None: waits.append(seconds))
    with serve(
        lambda handler, messages, number: (
            handler.reply(b"", 503, **({"Retry_After": "7"} if number == 1 else {})) if number < 4 else "Hi."
        )
    ) as server:
        asked = client(server, tmp_path, backoff=10.0)
        asked.ask(MESSAGES)
    waits = [seconds for seconds in waits if seconds]
    assert 5 <= waits[0] <= 10 and waits[1] == 7 and 20 <= waits[2] <= 40 and 40 <= waits[3] <= 80


def test_after_a_stop_nothing_is_tried_again(tmp_path):
    with serve(lambda handler, messages, number: handler.reply(b"later", 503, Retry_After="600")) as server:
        asked = client(server, tmp_path)
        asked.stop()
        with pytest.raises(chat.NoAnswer, match="1 tries"):
            asked.ask(MESSAGES)


def test_nothing_is_paid_twice(tmp_path):
    with serve(lambda handler, messages, number: f"answer {number}") as server:
        first, second = client(server, tmp_path), client(server, tmp_path)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:  # the same request at one moment, too
            assert set(pool.map(first.ask, [MESSAGES] * 8)) == {"answer 0"}
        assert second.ask(MESSAGES) == "answer 0" and second.ask(MESSAGES[:1]) == "answer 1"
        assert client(server, tmp_path, extra={"temperature": 0.5}).ask(MESSAGES) == "answer 2"
    assert first.counts == {"answers_paid": 1, "answers_from_disk": 7, "prompt_tokens": 100, "completion_tokens": 20}
    assert second.counts == {"answers_paid": 1, "answers_from_disk": 1, "prompt_tokens": 100, "completion_tokens": 20}


def test_a_kept_answer_that_is_broken_is_asked_for_again(tmp_path):
    with serve(lambda handler, messages, number: "Hi.") as server:
        client(server, tmp_path).ask(MESSAGES)
        (kept,) = (tmp_path / "answers").rglob("*.json")
        kept.write_text("{")
        client(server, tmp_path).ask(MESSAGES)
    assert len(server.requests) == 2 and json.loads(kept.read_text())["answer"]["text"] == "Hi."


def test_the_key_goes_to_the_endpoint_and_nowhere_else(tmp_path):
    with serve(lambda handler, messages, number: "Hi.") as server:
        client(server, tmp_path, key="secret", extra={"temperature": 0.5}).ask(MESSAGES)
        client(server, tmp_path).ask(MESSAGES)
    (body, headers), (_, without) = server.requests
    assert headers["Authorization"] == "Bearer secret" and "Authorization" not in without
    assert body == {"model": "m", "messages": MESSAGES, "temperature": 0.5}
    assert not [path for path in tmp_path.rglob("*.json") if "secret" in path.read_text()]
    assert "secret" not in repr(chat.Endpoint(server.url, "m", key="secret"))


def test_a_server_need_not_count_tokens(tmp_path):
    without = json.dumps({"choices": json.loads(completion("Hi."))["choices"], "usage": None}).encode()
    with serve(lambda handler, messages, number: handler.reply(without)) as server:
        asked = client(server, tmp_path)
        assert asked.ask(MESSAGES) == "Hi." and asked.counts["prompt_tokens"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"url": "localhost:8000"},
        {"url": "file:///etc/passwd"},
        {"model": ""},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"extra": [1]},
    ],
)
def test_an_endpoint_is_an_address_and_a_model(changes):
    with pytest.raises(ValueError, match="expected"):
        chat.Endpoint(**{"url": "http://localhost/v1", "model": "m"} | changes)


def test_the_address_may_be_given_whole():
    assert (
        chat.Endpoint("http://a/v1/", "m").address
        == chat.Endpoint("http://a/v1/chat/completions", "m").address
        == "http://a/v1/chat/completions"
    )


def test_a_redirect_takes_neither_the_text_nor_the_key_elsewhere(tmp_path):
    with serve(lambda handler, messages, number: "Hi.") as other:
        for status in (301, 302, 307, 308):
            moved = {"Location": f"{other.url}/chat/completions"}
            with (
                serve(
                    lambda handler, messages, number, to=moved, code=status: handler.reply(b"", code, **to)
                ) as server,
                pytest.raises(chat.EndpointError, match=f"HTTP {status}.*{other.url}"),
            ):
                client(server, tmp_path, key="secret").ask(MESSAGES)
        assert not other.requests


def test_a_password_of_netrc_is_not_sent(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serve(lambda handler, messages, number: "Hi.") as server:
        client(server, tmp_path).ask(MESSAGES)
        client(server, tmp_path, extra={"a": 1}, key="secret").ask(MESSAGES)
    (_, without), (_, headers) = server.requests
    assert "Authorization" not in without and headers["Authorization"] == "Bearer secret"


def test_an_address_where_nobody_is_ends_everything_at_once(tmp_path):
    with serve() as server:
        gone = client(server, tmp_path, backoff=100.0)
    with pytest.raises(chat.EndpointError, match="nobody answers"):
        gone.ask(MESSAGES)
