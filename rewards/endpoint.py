"""What a judge's client is made of: where the endpoint is, what was spent, whether it is up, what it said before."""

import asyncio
import email.utils
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from envs.errors import InputError
from envs.files import write_text
from rewards.rubric import Rubric, Verdict, check_answer

log = logging.getLogger(__name__)
MILLION = 1e6


def default_cache() -> str:
    """The folder of verdicts where the configuration names none."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_duplex" / "judge")


@dataclass(frozen=True)
class JudgeConfig:
    """Where the judge is and how it is asked.

    Attributes:
        base_url: of the endpoint, up to and with `/v1`.
        model: as the endpoint calls it.
        key_variable: name of the environment variable that holds the key, or None for a server that needs none.
        timeout: seconds for one call as a whole.
        concurrency: calls in flight, at most.
        retries: further calls after a failure that may pass (no connection, timeout, 408, 409, 429, 5xx, an answer
            that is no verdict).
        backoff: seconds before the first retry; doubles with each, with jitter, up to `max_wait`. `Retry-After` is
            honoured, unless it is longer than `max_wait`: then the question is given up.
        max_wait: the longest wait between two calls for one question, in seconds.
        failures: after so many calls in a row without an answer the server counts as down (circuit breaker), and
            questions are given up at once; after `cooldown` seconds one question probes whether it is back.
        cache: folder of the verdicts, shared between runs and processes; None keeps none.
        budget: money to spend, in the currency of the prices, by one process; None sets no limit. Cached verdicts cost
            nothing.
        price_input, price_output: of a million tokens.
        temperature, max_tokens: of the completion; None leaves it to the server.
        extra_body: further keys of the request, such as `{chat_template_kwargs: {enable_thinking: false}}`.

    Raises:
        InputError: a value that cannot be, or a secret where none belongs.
    """

    base_url: str
    model: str
    key_variable: str | None = None
    timeout: float = 60.0
    concurrency: int = 32
    retries: int = 4
    backoff: float = 0.5
    max_wait: float = 60.0
    failures: int = 10
    cooldown: float = 20.0
    cache: str | None = field(default_factory=default_cache)
    budget: float | None = None
    price_input: float = 0.0
    price_output: float = 0.0
    temperature: float | None = 0.0
    max_tokens: int | None = 1024
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.base_url if isinstance(self.base_url, str) else "")
            _ = url.port
        except ValueError as error:  # without the address, which may hold a key
            raise InputError(
                f"judge: base_url must be such as http://localhost:8000/v1, this is none ({type(error).__name__})"
            ) from None
        if url.username or url.password or url.query:  # not shown: it may be a key
            raise InputError("judge: base_url holds a user name, password or query: give a key through key_variable")
        if url.scheme not in ("http", "https") or not url.netloc:
            raise InputError(f"judge: base_url must be such as http://localhost:8000/v1, found {self.base_url!r}")
        if not isinstance(self.model, str) or not self.model:
            raise InputError(f"judge: model must be the endpoint's name of a model, found {self.model!r}")
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,60}", str(self.key_variable)):
            raise InputError("judge: key_variable must be the name of an environment variable, not the key itself")
        lowest = {"concurrency": 1, "failures": 1, "retries": 0, "max_tokens": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise InputError(f"judge: {name} must be a whole number of at least {low}, found {value!r}")
        for name in ("timeout", "backoff", "max_wait", "cooldown", "price_input", "price_output", "budget"):
            value = getattr(self, name)
            if name == "budget" and value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf") or (name == "timeout" and value == 0):
                raise InputError(f"judge: {name} must be a number of at least 0, found {value!r}")
        if self.cache is not None and (not isinstance(self.cache, str) or not self.cache):
            raise InputError(f"judge: cache must be a folder, or null to keep no verdicts, found {self.cache!r}")
        if not isinstance(self.extra_body, Mapping):
            raise InputError("judge: extra_body must be a mapping of further keys of the request")
        if self.budget is not None and not (self.price_input > 0 or self.price_output > 0):
            raise InputError("judge: a budget needs prices: give price_input and price_output (of a million tokens)")

    def price(self, input_tokens: float, output_tokens: float) -> float:
        """What so many tokens cost."""
        return (input_tokens * self.price_input + output_tokens * self.price_output) / MILLION

    def key(self) -> str:
        """The key, from the environment.

        Raises:
            InputError: the variable is not set, or what it holds is no key.
        """
        if self.key_variable is None:
            return "none"
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise InputError(
                f"judge: the environment variable {self.key_variable} is not set: put the endpoint's key there"
            )
        if not re.fullmatch(r"[\x21-\x7e]+", key):  # not shown; no header can hold it, and the client would quote it
            raise InputError(f"judge: {self.key_variable} holds a space, a line break or no ASCII: put one key there")
        return key


@dataclass
class Meter:
    """What a judge has done so far.

    Attributes:
        judged: questions with a verdict, of which `cached` needed no call.
        failed: questions without one.
        over_budget: those among them that were not asked because the budget was spent.
        calls: requests sent; retries: those among them that were not the first for their question.
        input_tokens, output_tokens: as the server counts them (where it does not: a token for four bytes).
        cost: by the configuration's prices.
        seconds: of the calls, summed (divided by `calls`: the latency).
    """

    judged: int = 0
    cached: int = 0
    failed: int = 0
    over_budget: int = 0
    calls: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    def read(self) -> dict[str, float]:
        """Everything by name."""
        return {name: float(value) for name, value in asdict(self).items()}


class CircuitBreaker:
    """Whether the server counts as up. For one event loop; see `JudgeConfig.failures` and `cooldown`."""

    def __init__(self, failures: int, cooldown: float) -> None:
        self.limit, self.cooldown = failures, cooldown
        self.failures, self.open_until = 0, 0.0
        self._probe: asyncio.Event | None = None

    async def admit(self) -> bool:
        """True where a call may be made, and must then be recorded.

        While one call probes a server that was down, the others wait for what becomes of it.
        """
        while self.failures >= self.limit:
            if time.monotonic() < self.open_until:
                return False
            if self._probe is None:
                self._probe = asyncio.Event()
                return True
            await self._probe.wait()
        return True

    def record(self, answered: bool) -> None:
        """What became of a call: any answer at all shows a server that is up."""
        self.failures = 0 if answered else self.failures + 1
        if self.failures >= self.limit:
            self.open_until = time.monotonic() + self.cooldown
        if self._probe is not None:
            self._probe.set()
            self._probe = None


class VerdictCache:
    """Verdicts on disk, a file each, by everything that the request is made of.

    Files are written under another name and renamed, so that any number of processes may share a folder.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config

    def key(self, messages: list[dict[str, str]]) -> str:
        """Of a request. How the answer's form is enforced is no part of it: it is checked either way."""
        config = self.config
        asked = [config.base_url.rstrip("/"), config.model, config.temperature, config.max_tokens, config.extra_body]
        return hashlib.sha256(json.dumps([*asked, messages], sort_keys=True, default=str).encode()).hexdigest()

    def read(self, key: str, rubric: Rubric) -> Verdict | None:
        """What is known, or None; a damaged file is not known."""
        if self.config.cache is None:
            return None
        try:
            return check_answer(json.loads(self._path(key).read_text(encoding="utf-8")), rubric)
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def write(self, key: str, verdict: Verdict, rubric: Rubric) -> None:
        """Keep a verdict. A folder that cannot be written is a warning: the verdict is good all the same."""
        if self.config.cache is None:
            return
        record: dict[str, Any] = {"reason": verdict.reason, **verdict.scores}
        if rubric.text:
            record[rubric.text] = verdict.text
        path = self._path(key)
        try:
            write_text(path, json.dumps(record))
        except OSError as error:
            log.warning("the judge's cache %s cannot be written (%s): verdicts are not kept", path.parent, error)

    def _path(self, key: str) -> Path:
        return Path(self.config.cache or "").expanduser() / key[:2] / f"{key}.json"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait (RFC 9110, 10.2.3: seconds or a date), or None."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
