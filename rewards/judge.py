"""A language model as judge, behind any endpoint that speaks OpenAI's chat completions: bounded, patient, remembered.

    judge = Judge(JudgeConfig(base_url="http://localhost:8000/v1", model="Qwen/Qwen3-8B"))
    rubric = Rubric("kindness", "Is the MODEL kind?", (Field("score", 0, 2),))
    [verdict] = judge.ask([Question(rubric, (Turn("USER", "how are you?"), Turn("MODEL", "fine, thanks")))])

Questions are asked concurrently on an event loop in a thread of the judge's own, so that whoever called `begin` can go
on working. What cannot be judged is None, never a number.
"""

import asyncio
import json
import logging
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from envs.errors import InputError
from rewards.endpoint import CircuitBreaker, JudgeConfig, Meter, VerdictCache, retry_after
from rewards.rubric import Field, Question, Rubric, Turn, Verdict, answer_schema, parse, prompt

__all__ = ["Field", "Judge", "JudgeConfig", "Meter", "Question", "Rubric", "Turn", "Verdict"]

log = logging.getLogger(__name__)
_CHECK_SECONDS = 20.0
_BYTES_PER_TOKEN = 4
_REFUSED = (400, 413, 422)  # of one question (a content filter, too long a context), not of whoever asks


class _Unjudgeable(Exception):
    """A question that is given up, and why; with the status that the server refused it with, if it did.

    `answered`: the judge was there, and this question it will not judge another time either.
    """

    def __init__(self, why: str, status: int | None = None, answered: bool = False) -> None:
        super().__init__(why)
        self.status, self.answered = status, answered or status in _REFUSED


class _Again(Exception):
    """A call that failed and may be repeated, after `wait` seconds where somebody said so; `answered` as above."""

    def __init__(self, why: str, wait: float | None = None, answered: bool = False) -> None:
        super().__init__(why)
        self.wait, self.answered = wait, answered


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, client: Any, process: int) -> "Future[None] | None":
    """Cancel what is not answered yet and end the thread of `_serve`, unless it is another process'."""

    async def end() -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()

    if process != os.getpid() or loop.is_closed():
        return None
    ended = asyncio.run_coroutine_threadsafe(end(), loop)
    ended.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    return ended


class Judge:
    """Asks a judge, concurrently; `meter` says what that took, `last_failure` why a question was given up.

    The key is read from the environment when the first question is asked, and is taken out of every text that comes
    back from the server.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.meter = Meter()
        self.last_failure = ""
        self._cause = ""  # of the last call that failed
        self._refused: set[str] = set()
        self._cache = VerdictCache(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Judge, (self.config,)  # a copy in another process has a thread and a meter of its own

    def ask(self, questions: Sequence[Question]) -> list[Verdict | None]:
        """A verdict for each question, in order; None for what could not be judged."""
        return self.begin(questions).result()

    def begin(self, questions: Sequence[Question]) -> "Future[list[Verdict | None]]":
        """Begin to ask, and return at once; the future's `result()` is what `ask` gives.

        Raises:
            InputError: the variable of the key is not set.
        """
        self.config.key()
        return self._run(self._ask_all(list(questions)))

    def refused(self, question: Question) -> bool:
        """Whether the judge was there and gave no verdict on a question (it declined, or what it said was none).

        A judge that has given none at all refuses whoever asks, and no question of theirs.
        """
        return self.meter.judged > 0 and self._cache.key(prompt(question)) in self._refused

    def check(self) -> None:
        """Whether the judge can be asked at all: the key is there, the endpoint answers and has the model.

        It asks for the list of models, and for a completion only where the model is not in it (some keep no list).

        Raises:
            InputError: what is wrong.
        """
        self.config.key()
        self._run(self._check()).result()

    def close(self) -> None:
        """End the judge's thread; what is not answered yet is cancelled. The next question starts another."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and self._forgotten.detach():
            ended = _end(loop, self._client, self._process)
            if ended is not None:
                ended.result(10)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> "Future[Any]":
        with self._lock:
            if self._loop is None or self._process != os.getpid():  # a fork has the loop but not its thread
                self._start()
            assert self._loop is not None
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _start(self) -> None:
        from openai import AsyncOpenAI

        config = self.config
        self._loop, self._process = asyncio.new_event_loop(), os.getpid()
        # Retries are our own: the client's know neither the breaker nor the budget.
        self._client = AsyncOpenAI(
            base_url=config.base_url, api_key=config.key(), timeout=config.timeout, max_retries=0
        )
        # The client takes these from OPENAI_*, whoever's endpoint it is.
        self._client.organization = self._client.project = None
        self._client._custom_headers = {}
        self._breaker = CircuitBreaker(config.failures, config.cooldown)
        self._in_flight = asyncio.Semaphore(config.concurrency)
        self._settled = asyncio.Condition()
        self._reserved: list[float] = []  # of the calls that are on their way
        self._not_before = 0.0
        self._structured = True
        self._pending: dict[str, asyncio.Future[Verdict | None]] = {}
        self._jitter = random.Random()  # not the global one, whose draws belong to whoever seeded it
        threading.Thread(target=_serve, args=(self._loop,), name="judge", daemon=True).start()
        # Nobody tells an axis that its run is over.
        self._forgotten = weakref.finalize(self, _end, self._loop, self._client, self._process)
        self._forgotten.atexit = False

    # From here on everything runs on the judge's own thread.

    async def _ask_all(self, questions: list[Question]) -> list[Verdict | None]:
        return list(await asyncio.gather(*(self._ask(question) for question in questions)))

    async def _ask(self, question: Question) -> Verdict | None:
        messages = prompt(question)
        key = self._cache.key(messages)
        known = self._cache.read(key, question.rubric)
        if known is None and key in self._pending:  # the same words are being judged at this moment
            known = await asyncio.shield(self._pending[key])
            if known is None:
                self.meter.failed += 1
                return None
        if known is not None:
            self.meter.judged += 1
            self.meter.cached += 1
            return replace(known, cached=True)
        pending = self._pending[key] = asyncio.get_running_loop().create_future()
        verdict = None
        try:
            verdict = await self._insist(messages, question.rubric)
            self.meter.judged += 1
            self._cache.write(key, verdict, question.rubric)
        except _Unjudgeable as error:
            self.meter.failed += 1
            self.last_failure = str(error)
            if error.answered:
                self._refused.add(key)
            log.debug("not judged: %s", error)
        finally:
            del self._pending[key]
            pending.set_result(verdict)
        return verdict

    async def _insist(self, messages: list[dict[str, str]], rubric: Rubric) -> Verdict:
        """A verdict, after as many calls as it takes and the configuration allows.

        Raises:
            _Unjudgeable: it was not to be had.
        """
        config = self.config
        why, answered = "", False
        for attempt in range(config.retries + 1):
            try:
                async with self._in_flight:
                    await self._hold_back()
                    return await self._call(messages, rubric, attempt)
            except _Again as error:
                why, wait, answered = str(error), error.wait, error.answered
            self.last_failure = self._cause = why
            if wait is None:
                wait = min(config.max_wait, config.backoff * 2**attempt) * self._jitter.uniform(0.5, 1.0)
            if wait > config.max_wait:
                raise _Unjudgeable(f"{why}; it asks to wait {wait:.0f} s, max_wait is {config.max_wait:g} s")
            if attempt < config.retries:
                await asyncio.sleep(wait)
        raise _Unjudgeable(f"{why}, after {config.retries + 1} calls", answered=answered)

    async def _hold_back(self) -> None:
        """Wait as long as the server has asked everybody to."""
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _call(self, messages: list[dict[str, str]], rubric: Rubric, attempt: int) -> Verdict:
        """One answer, within the budget.

        Raises:
            _Again: it failed and may be repeated.
            _Unjudgeable: it failed for good, or the budget is spent.
        """
        reserved = await self._reserve(messages)
        try:
            self.meter.retries += attempt > 0
            structured = self._structured
            try:
                body = await self._request(messages, rubric if structured else None)
            except _Unjudgeable as error:
                if not structured or error.status not in (400, 422, 501):
                    raise
                body = await self._request(messages, None)
                self._structured = False  # so it was the response format that it did not like
            answer = self._read(body, messages)
        finally:
            async with self._settled:
                self._reserved.remove(reserved)
                self._settled.notify_all()
        try:
            return parse(answer, rubric)
        except ValueError as error:
            raise _Again(self._clean(f"the answer is no verdict ({error})"), 0.0, answered=True) from error

    async def _reserve(self, messages: list[dict[str, str]]) -> float:
        """Set aside what a call can cost at most (a token is at least a byte), so that the budget is never exceeded.

        Raises:
            _Unjudgeable: what is left does not suffice.
        """
        budget = self.config.budget
        if budget is None:
            self._reserved.append(0.0)
            return 0.0
        most = self.config.price(len(json.dumps(messages).encode()) + 256, self.config.max_tokens or 8192)
        async with self._settled:
            while self.meter.cost + sum(self._reserved) + most > budget:
                if not self._reserved:
                    self.meter.over_budget += 1
                    raise _Unjudgeable(f"the budget of {budget:g} is spent (cost so far {self.meter.cost:.4g})")
                await self._settled.wait()
            self._reserved.append(most)
        return most

    async def _request(self, messages: list[dict[str, str]], rubric: Rubric | None) -> str:
        """One request: the body of a reply with a good status. A rubric asks for structured output.

        Raises:
            _Again, _Unjudgeable: no such reply.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        config = self.config
        if not await self._breaker.admit():
            raise _Unjudgeable(f"{config.base_url} is down (last: {self._cause})")
        started = time.monotonic()
        answered = False
        self.meter.calls += 1
        try:
            # The client's own timeout is for each read; a server that drips bytes would never exceed it.
            async with asyncio.timeout(config.timeout):
                body = await self._complete(messages, rubric)
            answered = True
            return body
        except (TimeoutError, APITimeoutError) as error:
            raise _Again(f"no answer within {config.timeout:g} s") from error
        except APIConnectionError as error:
            raise _Again(self._clean(f"no connection ({error.__cause__ or error})")) from error
        except APIStatusError as error:
            answered = error.status_code < 500 or error.status_code == 501  # 501 is an answer: not like this
            raise self._refusal(error) from error
        finally:
            self.meter.seconds += time.monotonic() - started
            self._breaker.record(answered)

    def _refusal(self, error: Any) -> _Again | _Unjudgeable:
        """What a status that is no success means: again, later, or never."""
        status = error.status_code
        why = self._clean(f"status {status} ({error.message})")
        if status not in (408, 409, 429) and (status < 500 or status == 501):
            return _Unjudgeable(why, status)
        wait = retry_after(error.response.headers)
        if wait is not None and status in (429, 503) and wait <= self.config.max_wait:
            self._not_before = max(self._not_before, time.monotonic() + wait)
        return _Again(why, wait)

    async def _complete(self, messages: list[dict[str, str]], rubric: Rubric | None) -> str:
        config = self.config
        request: dict[str, Any] = {"model": config.model, "messages": messages, **config.extra_body}
        if config.temperature is not None:
            request["temperature"] = config.temperature
        if config.max_tokens is not None:
            request["max_tokens"] = config.max_tokens
        if rubric is not None:
            schema = {"name": re.sub(r"\W", "_", rubric.name)[:60], "schema": answer_schema(rubric), "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        # The client's own path for requests that it has no method for. `chat.completions.create` would walk the
        # whole request through its type hints, a quarter of all processor time, and trip over a body that is not right.
        return await self._client.post("/chat/completions", cast_to=str, body=request)

    def _read(self, body: str, messages: list[dict[str, str]]) -> str:
        """The answer's text in a reply; its tokens are counted.

        Raises:
            _Again: the body is no chat completion.
        """
        try:
            reply = json.loads(body)
            answer = reply["choices"][0]["message"]["content"]
            usage = reply.get("usage") or {}
            sizes = [len(json.dumps(messages)), len(answer or "")]
            names = ("prompt_tokens", "completion_tokens")
            counted = [usage.get(name) for name in names]  # some servers send nulls
            guessed = [size / _BYTES_PER_TOKEN for size in sizes]
            tokens = [max(0, int(g if c is None else c)) for c, g in zip(counted, guessed, strict=True)]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise _Again(self._clean(f"the reply is no chat completion ({type(error).__name__}: {error})")) from error
        self.meter.input_tokens += tokens[0]
        self.meter.output_tokens += tokens[1]
        self.meter.cost += self.config.price(*tokens)
        if not isinstance(answer, str):
            raise _Again("the reply holds no text", answered=True)
        return self._without_key(answer)

    async def _check(self) -> None:
        from openai import APIConnectionError, APIStatusError

        config = self.config
        try:
            async with asyncio.timeout(min(config.timeout, _CHECK_SECONDS)):
                try:
                    listed = json.loads(await self._client.get("/models", cast_to=str))
                    if any(row["id"] == config.model for row in listed["data"]):
                        return
                except (APIStatusError, ValueError, TypeError, KeyError):
                    pass  # it keeps no list: ask the model itself
                await self._complete([{"role": "user", "content": "Answer with {}."}], None)
        except APIStatusError as error:
            why = self._clean(f"status {error.status_code}: {error.message}")
            if error.status_code in (401, 403):
                key = f"the key in {config.key_variable}" if config.key_variable else "calls without key_variable"
                raise InputError(f"judge: {config.base_url} refuses {key} ({why})") from None
            if error.status_code in (400, 404, 405, 422):
                raise InputError(
                    f"judge: {config.base_url} cannot be asked as model '{config.model}' ({why}): "
                    "correct base_url (it usually ends in /v1) or model"
                ) from None
        except (APIConnectionError, TimeoutError) as error:
            why = self._clean(str(error.__cause__ or error)) or "no answer in time"
            raise InputError(
                f"judge: {config.base_url} cannot be reached ({why}): start the server, or correct base_url"
            ) from None

    def _clean(self, text: str) -> str:
        """A message on one line, without the key and without what would steer a terminal."""
        line = " ".join(self._without_key(text).split())[:300]
        return "".join(c if c.isprintable() else "\ufffd" for c in line)

    def _without_key(self, text: str) -> str:
        key = self._client.api_key
        return text.replace(key, "[key]") if self.config.key_variable else text
