"""OpenAI's interface, driven by OpenAI's own client: answers are those of `predict`, whoever else is asking."""

import base64
import concurrent.futures
import contextlib
import io
import json
import re
import time

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serve.conftest import MAX_NEW_TOKENS

QUESTIONS = ("Where is the lung?", "What organ?", "Is there a tumor or heart?", "They are left?")


def png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (30 + seed, 40, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def messages(seed: int, question: str) -> list[dict]:
    url = "data:image/png;base64," + base64.b64encode(png(seed)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


@pytest.fixture
def expected(predictor, tmp_path):
    """What `predict` answers to a question about picture `seed`."""

    def ask(seed: int, question: str, region: str = ""):
        path = tmp_path / f"{seed}.png"
        path.write_bytes(png(seed))
        return predictor(path, question, region)

    return ask


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_is_that_of_predict(client, model, expected, question):
    found = client.chat.completions.create(model=model, messages=messages(1, question))
    want = expected(1, question)
    assert found.choices[0].message.content == want.answer
    assert found.usage.completion_tokens <= MAX_NEW_TOKENS and found.usage.prompt_tokens > 10
    drawn = [np.asarray(Image.open(io.BytesIO(base64.b64decode(m["png"])))) > 0 for m in found.choices[0].message.masks]
    assert len(drawn) == len(want.masks)
    for mine, its in zip(drawn, want.masks, strict=True):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize(
    ("region", "sent"),
    [
        ("box:3,4,20,21", {"type": "box", "points": [3, 4, 20, 21]}),
        ("point:10,12", {"type": "point", "points": [10, 12]}),
        ("polygon:2,2 30,3 20,25", {"type": "polygon", "points": [2, 2, 30, 3, 20, 25]}),
        ("scribble:2,2 30,3 20,25", {"type": "scribble", "points": [2, 2, 30, 3, 20, 25]}),
    ],
)
def test_a_region_is_that_of_predict(client, model, expected, region, sent):
    body = {"regions": [sent]}
    found = client.chat.completions.create(model=model, messages=messages(2, "What is <region>?"), extra_body=body)
    assert found.choices[0].message.content == expected(2, "What is <region>?", region).answer


def test_a_streamed_answer_adds_up_to_the_whole_one(client, model):
    asked = {"model": model, "messages": messages(1, QUESTIONS[0])}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    masks = [mask for chunk in chunks if chunk.choices for mask in getattr(chunk.choices[0].delta, "masks", [])]
    assert masks == whole.choices[0].message.masks


def test_a_picture_that_is_known_changes_no_answer(client, model, expected):
    """The second question skips what the first one ran, and a conversation goes on behind it."""
    asked = [messages(5, question) for question in (*QUESTIONS, QUESTIONS[0])]
    found = [client.chat.completions.create(model=model, messages=one).choices[0].message for one in asked]
    assert [one.content for one in found] == [expected(5, question).answer for question in (*QUESTIONS, QUESTIONS[0])]
    assert found[0].masks == found[-1].masks
    turns = [*asked[0], {"role": "assistant", "content": found[0].content}, {"role": "user", "content": QUESTIONS[1]}]
    again = [client.chat.completions.create(model=model, messages=turns).choices[0].message.content for _ in range(2)]
    assert again[0] == again[1]


def test_a_client_that_goes_away_frees_its_slot(server, client, model):
    asked = {"model": model, "messages": messages(1, QUESTIONS[0])}
    for _ in range(12):
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=httpx.Timeout(60, read=0.01))
    expected = (r'status="499"', r"slots_busy{[^}]*} 0.0", r"queue_length{[^}]*} 0.0")
    for _ in range(1200):
        figures = httpx.get(f"{server.url}/metrics", timeout=60).text
        if all(re.search(pattern, figures) for pattern in expected):
            return
        time.sleep(0.05)
    raise AssertionError(figures)


def test_many_at_once_change_no_answer(client, model):
    """Sampled and greedy, short and long: each as if it were alone."""
    asked = [
        {
            "messages": messages(seed, question),
            "temperature": temperature,
            "seed": seed,
            "max_tokens": 3 + 5 * (seed % 4),
        }
        for seed in range(6)
        for question in QUESTIONS[:2]
        for temperature in (0.0, 0.9)
    ]
    ask = lambda one: client.chat.completions.create(model=model, **one).choices[0].message.content
    alone = [ask(one) for one in asked]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, asked))
    assert together == alone
    assert len(set(alone)) > 4


def test_a_seed_draws_the_same_answer_and_another_one_another(client, model):
    ask = lambda seed: client.chat.completions.create(
        model=model, messages=messages(1, QUESTIONS[0]), temperature=1.5, seed=seed
    )
    answers = [ask(seed).choices[0].message.content for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1] and len(set(answers)) > 1


def test_stop_strings_and_limits_end_an_answer(client, model):
    asked = {"model": model, "messages": messages(1, QUESTIONS[0])}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    short = client.chat.completions.create(**asked, max_tokens=2)
    assert short.choices[0].finish_reason == "length" and whole.startswith(short.choices[0].message.content)
    stop = whole[len(whole) // 2 :][:2].strip()
    stopped = client.chat.completions.create(**asked, stop=stop)
    assert stopped.choices[0].message.content == whole[: whole.index(stop)].strip()
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "gpt-4"}, 404),
        ({"messages": []}, 400),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}
                ]
            },
            400,
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400),
        ({"temperature": -1}, 400),
        ({"temperature": "hot"}, 400),
        ({"top_p": 0}, 400),
        ({"n": 2}, 400),
        ({"temprature": 1.0}, 400),
        ({"repetition_penalty": 1.2}, 400),
        ({"tools": [{"type": "function"}]}, 400),
        ({"max_tokens": 0}, 400),
        ({"stop": [""]}, 400),
        ({"regions": [{"type": "star", "points": [1, 2]}]}, 400),
        ({"regions": [{"type": "box", "points": [1, 2, 900, 4]}]}, 400),
        ({"seed": 2**40}, 400),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_field(server, model, change, status):
    body = {"model": model, "messages": messages(1, QUESTIONS[0])} | change
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert found.status_code == status
    error = found.json()["error"]
    assert error["message"] and error["param"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": "x"}', json.dumps([1] * 9).encode()])
def test_a_body_that_is_no_request_is_refused(server, body):
    found = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400 and "error" in found.json()


def test_figures_are_counted_and_logs_hold_no_text(server, client, model):
    client.chat.completions.create(model=model, messages=messages(1, "Is Mrs Smith ill?"))
    figures = httpx.get(f"{server.url}/metrics").text
    assert "medplib_tokens_total" in figures and 'route="/v1/chat/completions"' in figures
    assert "Smith" not in figures and "Smith" not in server.log.read_text()
