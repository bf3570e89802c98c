"""Requests as evaluation suites send them to an OpenAI endpoint.

The forms stand here; where a suite is installed, its own code asks, too.
"""

import base64
import contextlib

import pytest

from tests.serve.test_chat import client, expected, model, png  # noqa: F401  (fixtures)

QUESTION = "Where is the lung?"
URL = {"url": "data:image/png;base64," + base64.b64encode(png(1)).decode()}
PICTURE, TEXT = {"type": "image_url", "image_url": URL}, {"type": "text", "text": QUESTION}
DETAILED = {"type": "image_url", "image_url": URL | {"detail": "low"}}
FORMS = {
    "VLMEvalKit": {
        "messages": [{"role": "user", "content": [DETAILED, TEXT]}],
        "max_tokens": 8,
        "n": 1,
        "temperature": 0,
    },
    "lmms-eval": {"messages": [{"role": "user", "content": [PICTURE, TEXT]}], "max_tokens": 8, "temperature": 0}
    | {"top_p": 1.0, "seed": 7, "presence_penalty": 0, "frequency_penalty": 0, "n": 1},
    "evalscope": {"messages": [{"role": "user", "content": [DETAILED, TEXT]}], "max_tokens": 8, "temperature": 0.0}
    | {"top_k": -1, "repetition_penalty": 1.0, "seed": 42, "n": 1, "logprobs": False, "stream": False},
}


@pytest.mark.parametrize("suite", FORMS)
def test_a_suites_request_is_answered_as_predict_answers(client, model, expected, suite):  # noqa: F811
    form = dict(FORMS[suite])
    beyond = {name: form.pop(name) for name in ("top_k", "repetition_penalty") if name in form}
    found = client.chat.completions.create(model=model, **form, extra_body=beyond)
    whole = expected(1, QUESTION).answer
    assert found.choices[0].message.content and whole.startswith(found.choices[0].message.content)
    assert found.usage.completion_tokens <= 8


def test_evalscopes_own_client_gets_the_answer(server, model, expected):  # noqa: F811
    pytest.importorskip("evalscope")
    from evalscope.api.messages import ChatMessageUser, ContentImage, ContentText
    from evalscope.api.model import GenerateConfig
    from evalscope.models.openai_compatible import OpenAICompatibleAPI

    api = OpenAICompatibleAPI(model, base_url=f"{server.url}/v1", api_key="none")
    message = ChatMessageUser(content=[ContentImage(image=URL["url"]), ContentText(text=QUESTION)])
    found = api.generate([message], [], "auto", GenerateConfig(max_tokens=8, temperature=0.0))
    assert found.completion and expected(1, QUESTION).answer.startswith(found.completion)


def test_lmms_evals_own_client_gets_the_answer(server, model, expected, tmp_path):  # noqa: F811
    pytest.importorskip("lmms_eval")
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.chat.openai import OpenAICompatible

    path = tmp_path / "1.png"
    path.write_bytes(png(1))
    content = [{"type": "image", "url": str(path)}, {"type": "text", "text": QUESTION}]
    arguments = ("", lambda doc: [{"role": "user", "content": content}], {"max_new_tokens": 8}, 0, "task", "test")
    asked = Instance("generate_until", arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})
    api = OpenAICompatible(model_version=model, base_url=f"{server.url}/v1", api_key="none", max_retries=1)
    api.task_dict = {"task": {"test": {0: {}}}}
    with contextlib.suppress(AttributeError):
        api.rank = 0
    (found,) = api.generate_until([asked])
    text = getattr(found, "text", found)
    assert text and expected(1, QUESTION).answer.startswith(text)
