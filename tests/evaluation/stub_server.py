"""A chat-completions server over real HTTP that behaves as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal


@dataclass(frozen=True)
class Act:
    """What the server does with one request.

    `fault` is what happens to the connection in place of a proper answer: it is lost at once,
    lost in the middle of the body, or the body trickles in without an end.
    """

    status: int = 200
    body: object = None
    headers: Mapping[str, str] = field(default_factory=dict)
    fault: Literal["", "lost", "half", "trickle"] = ""


@dataclass(frozen=True)
class Seen:
    """A request as it came in."""

    body: dict[str, Any]
    headers: dict[str, str]
    arrived: float

    @property
    def question(self) -> str:
        return str(self.body["messages"][-1]["content"])


def completion(text: str | None, finish: str = "stop", **message: object) -> Act:
    said = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": said, "finish_reason": finish}
    return Act(
        body={"id": "x", "object": "chat.completion", "created": 0, "model": "stub",
              "choices": [choice]}
    )  # fmt: skip


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Act:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Act(status, {"error": {"message": message, "code": code}}, named)


class Server:
    """The running server: where it is, what it saw, and how much at a time."""

    def __init__(self, behave: Callable[[Seen], Act]) -> None:
        self.behave = behave
        self.seen: list[Seen] = []
        self.most_at_a_time = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._under_way = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Else the body waits for the client to acknowledge the headers, 40 ms a reply.
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                # A client that went away is what some tests are about.
                with suppress(ConnectionError):
                    server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"])
        body = json.loads(handler.rfile.read(length))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Seen(body, {**headers, ":path": handler.path}, time.monotonic())
        with self._lock:
            self.seen.append(request)
            self._under_way += 1
            self.most_at_a_time = max(self.most_at_a_time, self._under_way)
        try:
            act = self.behave(request)
        finally:
            with self._lock:
                self._under_way -= 1
        self._send(handler, act)

    def _send(self, handler: BaseHTTPRequestHandler, act: Act) -> None:
        if act.fault == "lost":
            handler.close_connection = True
            handler.connection.shutdown(2)
            return
        raw = act.body if isinstance(act.body, bytes) else json.dumps(act.body).encode()
        handler.send_response(act.status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(raw) + 1000 * bool(act.fault)))
        for name, value in act.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw)
        while act.fault == "trickle" and not self.closing.wait(0.05):
            handler.wfile.write(b" ")
        handler.close_connection = bool(act.fault)


@contextmanager
def serving(behave: Callable[[Seen], Act]) -> Iterator[Server]:
    """Runs a server that does with each request what `behave` returns for it."""
    server = Server(behave)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def pairs(count: int) -> tuple[list[str], list[str]]:
    """Numbered prompts and answers to ask about."""
    return [f"request {index} ." for index in range(count)], [
        f"answer {index} ." for index in range(count)
    ]
