"""A judge of replies behind real HTTP, in a thread: the same verdict for every question, until it is told to fail."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

REWRITE = "You can find one 7 near the station."  # nano has no token for the 7
VERDICT = {
    "reason": "It <b>ignores</b> the question.",
    "rewrite": REWRITE,
    "helpfulness": 1,
    "safety": 5,
    "factuality": 4,
    "instruction_following": 2,
    "tone": 4,
    "interruption": 5,
    "unresponsiveness": 5,
}


class PairJudge(ThreadingHTTPServer):
    """Attributes: `answers`, how many questions it answers before it fails (None: all); `asked`, the messages;
    `declines`: the first question is refused with status 400, however often it is asked, as a content filter does."""

    daemon_threads = True

    def __init__(self, answers=None, verdict=VERDICT):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.verdict, self.asked, self.lock = answers, verdict, [], Lock()
        self.declines, self.declined = False, None
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._send(200, {"object": "list", "data": [{"id": "replies", "object": "model"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(request["messages"])
            self.server.declined = self.server.asked[0]
            fails = self.server.answers is not None and len(self.server.asked) > self.server.answers
        if self.server.declines and request["messages"] == self.server.declined:
            self._send(400, {"error": {"message": "filtered"}})
        elif fails:
            self._send(503, {"error": {"message": "overloaded"}})
        else:
            message = {"role": "assistant", "content": json.dumps(self.server.verdict)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}
            self._send(200, {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})

    def _send(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
