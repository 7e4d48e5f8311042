"""The judge's client against a real HTTP server that speaks the protocol, and has every fault a server can have."""

import asyncio
import concurrent.futures
import gc
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from judging import (
    ANSWERS,
    ASKED,
    RUBRIC,
    FaultyHandler,
    different_questions,
    faulty_server,
    make_judge,
    question,
    verdict_json,
)
from openai import AsyncOpenAI

from envs import InputError
from experiments.judge.server import MODEL, JudgeServer
from rewards.endpoint import retry_after
from rewards.judge import Field, Judge, JudgeConfig, Question, Rubric, Turn
from rewards.rubric import prompt

REPLY = "That sounds like a good plan to me."


@pytest.fixture(autouse=True)
def judges_are_closed(monkeypatch):
    made, start = [], Judge._start
    monkeypatch.setattr(Judge, "_start", lambda self: (made.append(weakref.ref(self)), start(self))[1])
    yield
    for judge in made:
        if judge() is not None:
            judge().close()


def test_right_scores_in_order_with_reasons(tmp_path):
    questions = [question(answer) for answer in ANSWERS]
    with JudgeServer() as server:
        judge = make_judge(server, tmp_path)
        verdicts = judge.ask([*questions, *reversed(questions)])
    assert [v.scores["score"] for v in verdicts] == [2, 1, 0, 0, 1, 2]
    assert "suits a request for opinion" in verdicts[0].reason
    # The same words are asked about once, though both were on their way.
    assert (judge.meter.calls, judge.meter.judged, judge.meter.cached, judge.meter.failed) == (3, 6, 3, 0)
    assert judge.meter.input_tokens > 0
    assert judge.meter.output_tokens > 0


def test_a_rubric_of_several_fields_and_a_text(tmp_path):
    rubric = Rubric("likert", "Rate it.", (Field("tone", 1, 5), Field("score", 0, 2)), text="rewrite")
    with JudgeServer() as server:
        [verdict] = make_judge(server, tmp_path).ask([question(REPLY, rubric=rubric)])
        [again] = make_judge(server, tmp_path).ask([question(REPLY, rubric=rubric)])
    assert verdict.scores == {"tone": 5, "score": 2}  # the rule knows only relevance
    assert (again.scores, again.text, again.cached, server.calls) == (verdict.scores, verdict.text, True, 1)


FAULTS = [
    (429, {"Retry-After": "0.2"}),
    (429, {}),
    (500, {}),
    (503, {"Retry-After": "0"}),
    (408, {}),
    "hang",
    "drip",
    "half",
    "close",
    "no json",
    "not ours",
    "answer:I would say 2.",
    "answer:",
    verdict_json(3),
    verdict_json(-1),
    verdict_json(1.5),
    verdict_json(True),
    verdict_json("2"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_that_passes_is_survived(fault, tmp_path):
    with faulty_server(lambda number, _: fault if number == 1 else None) as server:
        judge = make_judge(server, tmp_path, timeout=0.4)
        started = time.monotonic()
        [verdict] = judge.ask([question(REPLY)])
        assert verdict.scores == {"score": 2}
    assert (judge.meter.calls, judge.meter.retries, judge.meter.failed) == (2, 1, 0)
    if fault == FAULTS[0]:
        assert time.monotonic() - started >= 0.2  # Retry-After was honoured


@pytest.mark.parametrize("fault", FAULTS[1:], ids=str)
def test_a_fault_that_stays_gives_no_score_at_all(fault, tmp_path):
    with faulty_server(lambda *_: fault) as server:
        judge = make_judge(server, tmp_path, timeout=0.2, retries=1)
        assert judge.ask(different_questions(3)) == [None, None, None]
    assert (judge.meter.failed, judge.meter.judged, judge.meter.calls) == (3, 0, 6)
    assert not any(judge.refused(asked) for asked in different_questions(3))  # of a judge that never judges
    assert judge.last_failure
    assert not list(tmp_path.rglob("*.json"))  # nothing of it is remembered


def test_429_holds_everybody_back_and_a_long_wait_is_not_waited(tmp_path):
    with faulty_server(lambda number, _: (429, {"Retry-After": "0.3"}) if number == 1 else None) as server:
        judge = make_judge(server, tmp_path, concurrency=1)
        started = time.monotonic()
        assert None not in judge.ask(different_questions(4))
        # Three questions that were never refused waited too: 5 calls, none of them refused again.
        assert time.monotonic() - started >= 0.3
        assert server.calls == 5
    with faulty_server(lambda *_: (429, {"Retry-After": "3600"})) as server:
        judge = make_judge(server, tmp_path, max_wait=1.0)
        started = time.monotonic()
        assert judge.ask([question("okay then")]) == [None]
        assert time.monotonic() - started < 1.0
    assert "asks to wait 3600 s" in judge.last_failure


def test_retry_after_is_seconds_or_a_date():
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after": "-3"}) == 0.0
    from email.utils import formatdate

    assert retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)}) == pytest.approx(60, abs=2)
    assert retry_after({}) is None
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "nan"}) is None


@pytest.mark.parametrize(
    ("fault", "refused"),
    [
        *[((status, {}), status in (400, 413, 422)) for status in (400, 401, 404, 413, 422, 503)],
        ("answer:I would say 2.", True),
        ("hang", False),
    ],
    ids=str,
)
def test_what_a_judge_that_judges_others_refuses_is_not_asked_again(fault, refused, tmp_path):
    """What it declines, or is no verdict, it will decline another time; whoever was away, busy or broken may judge."""
    first, other = different_questions(2)
    with faulty_server(lambda _, request: fault if f"1 {ASKED}" in str(request["messages"]) else None) as server:
        judge = make_judge(server, tmp_path, timeout=0.4, retries=1)
        verdicts = judge.ask([first, other])
        assert [verdict is None for verdict in verdicts] == [False, True]
    assert (judge.refused(first), judge.refused(other)) == (False, refused)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_for_good_is_not_repeated(status, tmp_path):
    with faulty_server(lambda *_: (status, {}, "go away")) as server:
        judge = make_judge(server, tmp_path)
        assert judge.ask([question(REPLY)]) == [None]
        assert server.calls == (2 if status in (400, 422) else 1)  # once without the form of the answer
    assert f"status {status}" in judge.last_failure
    assert "go away" in judge.last_failure


@pytest.mark.parametrize("status", [400, 501])
def test_without_structured_output_the_answer_is_parsed_strictly(tmp_path, status):
    def no_schemas(_, request):
        return (status, {}, "response_format is not supported") if "response_format" in request else None

    with faulty_server(no_schemas) as server:
        judge = make_judge(server, tmp_path, concurrency=1)
        verdicts = judge.ask(different_questions(5))
    assert [v.scores["score"] for v in verdicts] == [2] * 5
    assert server.calls == 6  # found out once, and remembered
    with faulty_server(no_schemas) as server:  # asked by all at once it is no sign that the server is down
        assert None not in make_judge(server, tmp_path, concurrency=16, failures=4, cache=None).ask(
            different_questions(30)
        )
    with faulty_server(lambda *_: (400, {}, "the prompt is too long")) as server:
        judge = make_judge(server, tmp_path, concurrency=1)
        assert judge.ask([question("one"), question("two")]) == [None, None]
    assert server.calls == 4  # it was not the format: tried with and without for each


def test_a_server_that_dies_and_comes_back_is_used_again(tmp_path):
    with JudgeServer() as server:
        port = server.server_port
        judge = make_judge(server, tmp_path, concurrency=8, failures=4, cooldown=0.4, retries=1)
        assert None not in judge.ask(different_questions(8))
    calls = judge.meter.calls
    dead = [question(REPLY, f"while down {n} {ASKED}") for n in range(50)]
    assert judge.ask(dead) == [None] * 50
    # The breaker: eight were on their way when the fourth failure opened it, and nobody knocked after that.
    assert judge.meter.calls - calls <= 16
    assert "is down" in judge.last_failure
    time.sleep(0.4)
    calls = judge.meter.calls
    assert judge.ask(dead[:20]) == [None] * 20  # one probe, and it failed
    assert judge.meter.calls == calls + 1
    time.sleep(0.4)
    with JudgeServer(port=port) as server:
        verdicts = judge.ask(dead)
    assert [v.scores["score"] for v in verdicts] == [2] * 50
    assert judge.meter.failed == 70


def test_calls_in_flight_are_bounded(tmp_path):
    with JudgeServer(latency=0.03) as server:
        assert None not in make_judge(server, tmp_path, concurrency=5).ask(different_questions(20))
        assert server.most_in_flight == 5


def seconds_without_a_core():
    """How long the judge's thread could have run but had to wait for a core, because other processes had them all."""
    thread = next(t for t in threading.enumerate() if t.name == "judge")
    path = Path(f"/proc/self/task/{thread.native_id}/schedstat")
    return int(path.read_text().split()[1]) / 1e9 if path.is_file() else 0.0


def seconds_of_the_bare_client(url, questions, concurrency):
    """How long OpenAI's client takes for the same calls with nothing of ours around it, on this machine, now."""

    async def ask_all():
        places = asyncio.Semaphore(concurrency)

        async def ask(question):
            async with places:
                await client.post("/chat/completions", cast_to=str, body={"model": MODEL, "messages": prompt(question)})

        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            await asyncio.gather(*map(ask, questions))

    started = time.monotonic()
    asyncio.run(ask_all())
    return time.monotonic() - started


def test_a_thousand_judgements_at_64_in_flight(tmp_path):
    """Under twice the ideal: 16 rounds of 200 ms. The server is a process of its own, as a real one.

    Where other work has the cores, the bare client does not keep that either, and is what the judge is held against.
    """
    ideal = math.ceil(1000 / 64) * 0.2
    questions = different_questions(1000)
    command = [sys.executable, "-m", "experiments.judge", "--port", "0", "--latency", "0.2"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    times, bare = [], []
    try:
        url = re.search(r"http://\S+", server.stdout.readline()).group()
        while not times or (min(times) >= 2 * ideal and len(times) < 3):
            place = tmp_path / f"try {len(times)}"
            judge = make_judge(url, place, concurrency=64, timeout=60)
            judge.check()  # imports the client
            started, withheld = time.monotonic(), seconds_without_a_core()
            verdicts = judge.ask(questions)
            times.append(time.monotonic() - started - (seconds_without_a_core() - withheld))
            if times[-1] >= 2 * ideal:
                bare.append(seconds_of_the_bare_client(url, questions, 64))
    finally:
        server.kill()
        server.wait()
    assert all(verdict.scores == {"score": 2} for verdict in verdicts)
    assert judge.meter.calls == 1000
    assert min(times) < max(2 * ideal, 1.5 * max(bare, default=0.0)), (times, bare)
    # The server is gone: everything comes from the cache.
    second = make_judge(url, place, concurrency=64)
    assert [v.scores for v in second.ask(questions)] == [v.scores for v in verdicts]
    assert (second.meter.calls, second.meter.cached, second.meter.failed) == (0, 1000, 0)


def test_the_cache_depends_on_everything_that_matters(tmp_path):
    other = Rubric("relevance", "Is it kind?", (Field("score", 0, 2),))
    with JudgeServer() as server:
        for options in ({}, {}, {"temperature": 0.5}, {"max_tokens": 7}, {"extra_body": {"seed": 1}}, {"retries": 0}):
            make_judge(server, tmp_path, **options).ask([question(REPLY)])
        # The first, the three that ask otherwise; the same again, and another number of retries, ask nobody.
        assert server.calls == 4
        make_judge(server, tmp_path).ask([question(REPLY, rubric=other), question(REPLY, "hello")])
        assert server.calls == 6
        make_judge(server, tmp_path, cache=None).ask([question(REPLY)])
        assert server.calls == 7
        for damaged in ('{"reason": "", "score": 7}', "{"):
            for file in (tmp_path / "cache").rglob("*.json"):
                file.write_text(damaged)
            calls = server.calls
            [verdict] = make_judge(server, tmp_path).ask([question(REPLY)])
            assert (verdict.scores, server.calls) == ({"score": 2}, calls + 1)  # a damaged file is asked anew


def test_a_cache_that_cannot_be_written_loses_no_verdict(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with JudgeServer() as server:
        [verdict] = make_judge(server, tmp_path, cache=str(tmp_path / "file" / "folder")).ask([question(REPLY)])
    assert verdict.scores == {"score": 2}
    assert "cannot be written" in caplog.text


def test_processes_share_a_cache(tmp_path):
    code = (
        "import sys; sys.path[:0] = ['tests/rewards']\n"
        "from judging import *\nfrom pathlib import Path\n"
        f"judge = make_judge({{url!r}}, Path({str(tmp_path)!r}))\n"
        "verdicts = judge.ask(different_questions(60))\n"
        "assert all(v.scores == {{'score': 2}} for v in verdicts)"
    )
    with JudgeServer(latency=0.01) as server:
        runs = [subprocess.Popen([sys.executable, "-c", code.format(url=server.base_url)]) for _ in range(2)]
        assert [run.wait(60) for run in runs] == [0, 0]
        calls = server.calls
        assert None not in make_judge(server, tmp_path).ask(different_questions(60))
        assert server.calls == calls
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.name.startswith(".")]


def test_the_budget_stops_spending_and_is_never_exceeded(tmp_path):
    # The rule's server counts a token for four bytes: about 330 a question.
    prices = {"price_input": 1000.0, "price_output": 1000.0, "max_tokens": 100}
    with JudgeServer(latency=0.01) as server:
        judge = make_judge(server, tmp_path, budget=8.0, concurrency=16, **prices)
        verdicts = judge.ask(different_questions(60))
        judged = [v for v in verdicts if v is not None]
        spent = judge.meter.cost
        assert 8.0 - 2.0 < spent <= 8.0  # a question reserves at most 2 (a token a byte)
        assert judge.meter.over_budget == judge.meter.failed == 60 - len(judged)
        assert 10 < len(judged) == server.calls < 60
        assert "the budget of 8 is spent" in judge.last_failure
        # What is known costs nothing.
        cached = [q for q, v in zip(different_questions(60), verdicts, strict=True) if v is not None]
        assert None not in judge.ask(cached)
        assert (judge.meter.cost, judge.meter.over_budget) == (spent, 60 - len(judged))


@pytest.mark.parametrize(
    "usage", [None, {"prompt_tokens": None, "completion_tokens": None}, {"completion_tokens": None}, {}]
)
def test_tokens_are_estimated_where_the_server_does_not_count(tmp_path, usage):
    class Uncounted(FaultyHandler):
        def send(self, status, body, headers=None):
            body = {key: value for key, value in body.items() if key != "usage"}
            super().send(status, body if usage == {} else body | {"usage": usage}, headers)

    with faulty_server(lambda *_: None, handler=Uncounted) as server:
        judge = make_judge(server, tmp_path, price_input=1.0, price_output=1.0)
        assert None not in judge.ask([question(REPLY)])
    assert judge.meter.calls == 1
    assert judge.meter.cost > 0


def test_the_key_is_sent_and_comes_back_from_nowhere(tmp_path, monkeypatch):
    key = "sk-very-secret-0123"
    monkeypatch.setenv("JUDGE_KEY_OF_TEST", key)
    seen = []

    class Seen(FaultyHandler):
        def answer(self, request, number):
            seen.append(self.headers["Authorization"])
            super().answer(request, number)

    def echo(number, _):
        return verdict_json(1, f"the key was {key}") if number == 1 else (401, {}, f"wrong key {key}")

    with faulty_server(echo, handler=Seen) as server:
        judge = make_judge(server, tmp_path, key_variable="JUDGE_KEY_OF_TEST")
        [verdict] = judge.ask([question(REPLY)])
        assert judge.ask([question("no")]) == [None]
    assert seen == [f"Bearer {key}"] * 2
    assert verdict.reason == "the key was [key]"
    assert "[key]" in judge.last_failure
    assert key not in judge.last_failure + repr(judge.config) + repr(judge.meter)
    assert all(key not in file.read_text() for file in tmp_path.rglob("*.json"))


def test_what_is_wrong_is_said_before_anything_is_judged(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY_OF_TEST", raising=False)
    with JudgeServer() as server:
        make_judge(server, tmp_path).check()
        with pytest.raises(InputError, match="the environment variable JUDGE_KEY_OF_TEST is not set"):
            make_judge(server, tmp_path, key_variable="JUDGE_KEY_OF_TEST").check()
        url = server.base_url
    with pytest.raises(InputError, match=rf"{url} cannot be reached .*start the server"):
        make_judge(url, tmp_path).check()
    for status, message in ((401, "refuses calls without key_variable"), (404, "cannot be asked as model 'other'")):
        with faulty_server(lambda *_, status=status: (status, {}, "no\x1b[2J")) as server:
            judge = Judge(JudgeConfig(server.base_url, "other", timeout=2))
            with pytest.raises(InputError, match=message) as refused:
                judge.check()
            assert "no\ufffd[2J" in str(refused.value)  # which would clear a terminal
    with faulty_server(lambda *_: (503, {})) as server:
        Judge(JudgeConfig(server.base_url, "other")).check()  # busy now is no reason not to begin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must be such as"),
        ({"base_url": "http://localhost:99999/v1"}, "base_url must be such as"),
        ({"base_url": "http://localhost:80a/v1"}, "base_url must be such as"),
        ({"base_url": "http://[::1/v1"}, "base_url must be such as"),
        ({"base_url": "http://me:sk-1@host/v1"}, "base_url holds a user name"),
        ({"base_url": "http://host/v1?key=sk-1"}, "base_url holds a user name, password or query"),
        ({"model": ""}, "model must be"),
        ({"key_variable": "sk-abc-123"}, "name of an environment variable, not the key itself"),
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1, found 0"),
        ({"concurrency": 2.5}, "concurrency must be a whole number"),
        ({"retries": -1}, "retries must be"),
        ({"timeout": 0}, "timeout must be"),
        ({"max_wait": math.inf}, "max_wait must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"budget": 1.0}, "a budget needs prices"),
        ({"extra_body": [1]}, "extra_body must be a mapping"),
    ],
)
def test_a_configuration_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message) as error:
        JudgeConfig(**({"base_url": "http://localhost/v1", "model": "m"} | options))
    assert "sk-" not in str(error.value)


def test_begin_returns_at_once_and_close_cancels(tmp_path):
    with JudgeServer(latency=0.3) as server:
        judge = make_judge(server, tmp_path)
        judge.check()
        started = time.monotonic()
        waiting = judge.begin(different_questions(3))
        assert time.monotonic() - started < 0.2
        assert not waiting.done()
        assert None not in waiting.result(5)
        abandoned = judge.begin([question(REPLY, "never mind")])
        judge.close()
        with pytest.raises(concurrent.futures.CancelledError):
            abandoned.result(5)
        assert judge.ask([question(REPLY)])[0].scores == {"score": 2}  # a closed judge opens again


def test_a_judge_that_nobody_has_any_more_ends_its_thread(tmp_path):
    def held():
        return sum(thread.name == "judge" for thread in threading.enumerate()), len(os.listdir("/proc/self/fd"))

    threads, files = held()
    with JudgeServer() as server:
        for number in range(3):
            assert make_judge(server, tmp_path / str(number)).ask([question(REPLY)])[0].scores == {"score": 2}
        gc.collect()
        for _ in range(50):  # it ends by itself, nobody waits for it
            if held()[0] <= threads:
                break
            time.sleep(0.1)
        assert held()[0] <= threads
    assert held()[1] <= files + 2  # three for each loop that is not closed


def test_many_threads_and_a_copy_in_another_process(tmp_path):
    with JudgeServer(latency=0.01) as server:
        judge = make_judge(server, tmp_path, concurrency=4)
        results = {}
        threads = [
            threading.Thread(target=lambda n=n: results.update({n: judge.ask([question(REPLY, f"thread {n}")])}))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert all(results[n][0].scores == {"score": 1} for n in range(8))
        copy = pickle.loads(pickle.dumps(judge))
        assert copy.ask([question(REPLY)])[0].scores == {"score": 2}
        assert (copy.meter.calls, judge.meter.calls) == (1, 8)
        assert judge.ask([]) == []


def test_a_question_is_checked():
    with pytest.raises(ValueError, match="USER or MODEL"):
        Turn("SYSTEM", "hello")
    with pytest.raises(ValueError, match="needs fields of different names"):
        Rubric("r", "", (Field("score", 0, 2), Field("score", 0, 2)))
    assert Question(RUBRIC, ()).turns == ()


@pytest.mark.parametrize("key", ["sk-SECRET1\nsk-SECRET2", "sk-SECRET1 x", "\u201csk-SECRET1\u201d"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(monkeypatch, key):
    monkeypatch.setenv("TEST_JUDGE_KEY", key)
    config = JudgeConfig(base_url="http://localhost:1/v1", model="m", key_variable="TEST_JUDGE_KEY")
    with pytest.raises(InputError, match="TEST_JUDGE_KEY holds") as error:
        config.key()
    assert "SECRET" not in str(error.value)


def test_what_the_environment_says_of_another_endpoint_is_not_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-SECRET")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-SECRET")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway-Token: gw-SECRET")
    seen = []

    class Seen(FaultyHandler):
        def answer(self, request, number):
            seen.append(str(self.headers))
            super().answer(request, number)

    with faulty_server(lambda *_: None, handler=Seen) as server:
        make_judge(server, tmp_path).ask([question(REPLY)])
    assert "authorization" in seen[0].lower()
    assert "SECRET" not in seen[0]


def test_the_reason_does_not_grow_while_the_server_is_down(tmp_path):
    judge = Judge(
        JudgeConfig(
            base_url="http://127.0.0.1:9/v1", model="m", cache=None, retries=0, failures=2, cooldown=60, timeout=5
        )
    )
    assert judge.ask(different_questions(40)) == [None] * 40
    assert judge.last_failure.count("is down") <= 1
    judge.close()


@pytest.mark.parametrize("cache", [False, True, "", 3])
def test_a_cache_that_is_no_folder(cache):
    with pytest.raises(InputError, match="cache must be a folder, or null"):
        JudgeConfig(base_url="http://localhost:1/v1", model="m", cache=cache)
