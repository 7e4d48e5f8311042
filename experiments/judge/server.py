"""The rule of `experiments.judge.relevance` behind OpenAI's chat completions, over HTTP.

It answers `GET /v1/models` and `POST /v1/chat/completions`, with structured output. Whatever rubric it is asked by, it
knows one thing: the field `score` is the relevance, any other number the highest that the schema allows.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from experiments.judge.relevance import relevance
from rewards.rubric import CLOSING, OPENING

MODEL = "relevance"


def conversation_of(messages: list[Mapping[str, str]]) -> list[dict[str, str]]:
    """The turns in a judge's prompt.

    Raises:
        ValueError: the last message is not a conversation between its delimiters.
    """
    text = messages[-1]["content"]
    if not (text.startswith(OPENING) and text.endswith(CLOSING)):
        raise ValueError("the last message holds no conversation")
    return json.loads(text[len(OPENING) : -len(CLOSING)])


def verdict(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request, by its schema where it has one."""
    score, reason = relevance(conversation_of(request["messages"]))
    schema = request.get("response_format", {}).get("json_schema", {}).get("schema", {})
    answer: dict[str, Any] = {"reason": reason}
    for name, form in schema.get("properties", {"score": {"enum": [0, 1, 2]}}).items():
        if name == "reason":
            continue
        allowed = form.get("enum")
        answer[name] = "" if allowed is None else score if name == "score" and score in allowed else max(allowed)
    return answer


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: JudgeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with self.server.judging() as number:
                time.sleep(self.server.latency)
            self.answer(request, number)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            self.send(400, {"error": {"message": str(error), "type": "invalid_request_error"}})

    def answer(self, request: Mapping[str, Any], number: int) -> None:
        """Send the verdict. `number`: of the call, from 1."""
        content = json.dumps(verdict(request))
        size = sum(len(message["content"]) for message in request["messages"])
        self.send(
            200,
            {
                "id": "judged",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                ],
                "usage": {
                    "prompt_tokens": size // 4,
                    "completion_tokens": len(content) // 4,
                    "total_tokens": size // 4 + len(content) // 4,
                },
            },
        )

    def send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class JudgeServer(ThreadingHTTPServer):
    """The server, in threads of its own: `with JudgeServer() as server: ... server.base_url`.

    Args:
        port: 0 takes a free one.
        latency: seconds that a judgement takes.
        handler: another behaviour.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int = 0, latency: float = 0.0, handler: type[Handler] = Handler) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.latency = latency
        self.calls = self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @contextmanager
    def judging(self) -> Iterator[int]:
        """Count a call; gives its number, from 1."""
        with self._lock:
            self.calls += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            number = self.calls
        try:
            yield number
        finally:
            with self._lock:
                self.in_flight -= 1

    def get_request(self) -> tuple[Any, Any]:
        request, address = super().get_request()
        with self._lock:
            self._connections.add(request)
        return request, address

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()
        with self._lock:  # those that are kept alive would go on being served
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
