"""What the tests of judges share: questions with known answers, and a server with every fault a server can have."""

import json
import time
from contextlib import suppress

from experiments.judge.server import Handler, JudgeServer
from rewards.judge import Field, Judge, JudgeConfig, Question, Rubric, Turn

RUBRIC = Rubric("relevance", "Is the MODEL's answer relevant?", (Field("score", 0, 2),))
ASKED = "I have a dog what do you think"
# What the rule of experiments/judge says of these answers to ASKED.
ANSWERS = {
    "That sounds like a good plan to me.": 2,
    "The best time is early in the morning.": 1,
    "plan sounds early small bank": 0,
}


def question(answer, asked=ASKED, rubric=RUBRIC):
    return Question(rubric, (Turn("USER", asked), Turn("MODEL", answer)))


def different_questions(count):
    """Questions no two of which are the same, all of score 2."""
    return [question("That sounds like a good plan to me.", f"{n} {ASKED}") for n in range(count)]


def make_judge(server, tmp_path, **options):
    """A judge at a server (or at an address) with short waits and a cache of the test's own."""
    url = server if isinstance(server, str) else server.base_url
    quick = {"backoff": 0.01, "timeout": 5.0, "cache": str(tmp_path / "cache")}
    return Judge(JudgeConfig(url, "relevance", **(quick | options)))


class FaultyHandler(Handler):
    """Asks `server.fault(number, request)` before each answer; None is a right one."""

    def answer(self, request, number):
        fault = self.server.fault(number, request)
        if fault is None:
            return super().answer(request, number)
        if isinstance(fault, tuple):  # a status, with or without headers
            self.send(fault[0], {"error": {"message": fault[2] if len(fault) > 2 else "no"}}, fault[1])
        elif isinstance(fault, str) and fault.startswith("answer:"):
            message = {"role": "assistant", "content": fault.removeprefix("answer:")}
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            self.send(200, {"choices": [{"message": message}], "usage": usage})
        elif fault == "close":
            self.close_connection = True
        elif fault == "hang":
            time.sleep(1.0)
            self.close_connection = True
        else:
            self.broken_body(fault)

    def broken_body(self, fault):
        body = {"half": b'{"choices": [{"mess', "no json": b"<html>busy</html>", "not ours": b'{"choices": []}'}
        data = body.get(fault, b"")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if fault in ("no json", "not ours") else 400))
        self.end_headers()
        self.wfile.write(data)
        if fault == "drip":
            for _ in range(20):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
        self.close_connection = True

    def handle(self):
        with suppress(ConnectionError):  # the client gives up on us, as it should
            super().handle()


def faulty_server(fault, handler=FaultyHandler):
    """A server in a thread that has `fault(number, request)`."""
    server = JudgeServer(handler=handler)
    server.fault = fault
    return server


def verdict_json(score, reason="because"):
    return "answer:" + json.dumps({"reason": reason, "score": score})
