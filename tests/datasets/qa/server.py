"""A chat endpoint on this machine that answers sensibly, unless it is told to fail."""

import contextlib
import http.server
import json
import re
import threading

REFERENCE = re.compile(r"^- ([^:\n]+): (?:in the|over much)", re.MULTILINE)
NOTE = re.compile(r"^- note: (.*)$", re.MULTILINE)
NAMES = re.compile(r"exactly as they must be given: (.*)\n")


def names_of(messages) -> list[str]:
    """The structures that a request is about."""
    text = messages[1]["content"]
    listed = NAMES.search(text)
    return re.findall(r'"([^"]+)"', listed[1]) if listed else REFERENCE.findall(text.partition("What is known:")[2])


def is_description(messages) -> bool:
    return '{"description"' in messages[1]["content"]


def describe(names, note="A") -> dict:
    shown = ", ".join(f"<ref>the {name}</ref>" for name in names) or "nothing else"
    return {"description": f"{note} CT image shows {shown}."}


def questions(names) -> dict:
    return {
        "vqa": [
            {"question": "Is this a CT image?", "answer": "yes", "choices": ["Yes", "No"]},
            {
                "question": "What can be seen here?",
                "answer": f"Among others {', '.join(names) or 'nothing'}.",
                "choices": [],
            },
        ],
        "region": [
            {"name": name, "question": "What is shown in <region>?", "answer": f"This is the {name}.", "choices": []}
            for name in names
        ],
        "grounding": [
            {"names": [name], "question": f"Where is the {name}?", "answer": f"The {name} is <SEG>."} for name in names
        ],
        "captions": [{"name": name, "caption": f"The {name}, as usual."} for name in names],
    }


def sensible(messages) -> str:
    names, note = names_of(messages), NOTE.search(messages[1]["content"])
    return json.dumps(describe(names, note[1] if note else "A") if is_description(messages) else questions(names))


def completion(text: str) -> bytes:
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return json.dumps(
        {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}], "usage": usage}
    ).encode()


class Server(http.server.ThreadingHTTPServer):
    """`behave(handler, messages, number)` answers request `number`, or returns a text to answer with.

    `requests`: (body, headers) of all.
    """

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.requests, self.most_at_once = behave, [], 0
        self.guard, self.at_once, self.closing = threading.Lock(), 0, threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client may hang up."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.guard:
            number = len(server.requests)
            server.requests.append((body, dict(self.headers)))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            text = server.behave(self, body["messages"], number)
            if text is not None:
                self.reply(completion(text))
        finally:
            with server.guard:
                server.at_once -= 1

    def reply(self, body: bytes, status: int = 200, **headers) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": len(body),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def stall(self) -> None:
        """Nothing more comes until the server is closed."""
        self.wfile.flush()
        self.server.closing.wait(60)

    def log_message(self, *arguments):
        """Quiet."""


@contextlib.contextmanager
def serve(behave=lambda handler, messages, number: sensible(messages)):
    server = Server(behave)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
