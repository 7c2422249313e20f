"""Replay a trace of requests against a server with OpenAI's API, and say what its users saw. No torch here.

Goodput is the number of requests a second that met both objectives; attainment is their share of all requests. Requests
that were refused or failed count as missed.
"""

from __future__ import annotations

import http.client
import json
import lzma
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import mean, quantiles
from typing import Any
from urllib.parse import urlsplit

from flextron.atomic import write_text
from flextron.errors import FlextronError

_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at: float
    """Seconds from the start of the trace."""
    prompt: str
    max_tokens: int
    budget: str | None = None


@dataclass(frozen=True)
class Target:
    """Which server to ask, and how."""

    url: str
    """Such as http://127.0.0.1:8000."""
    model: str
    budget: str | None = None
    """For arrivals that name none; None leaves it to the server."""
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    send_objectives: bool = False
    """Tell the server the objectives, in the headers x-slo-ttft-ms and x-slo-tpot-ms."""
    api_key: str | None = None


@dataclass
class Outcome:
    """What became of one request."""

    arrival: Arrival
    status: int = 0
    """HTTP status; 0 where there was no answer."""
    error: str | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    tokens: int = 0
    levels: dict[str, int] = field(default_factory=dict)
    """Tokens by the level that wrote them, where the server says so."""

    def met(self, target: Target) -> bool:
        """Whether there was a whole answer, in time."""
        if self.status != 200 or self.error is not None or self.ttft_ms is None:
            return False
        in_time = target.ttft_ms is None or self.ttft_ms <= target.ttft_ms
        return in_time and (target.tpot_ms is None or self.tpot_ms is None or self.tpot_ms <= target.tpot_ms)


def burst_trace(
    prompts: Sequence[str],
    *,
    rates: Sequence[float] = (0.5, 1.5, 0.5),
    seconds: Sequence[float] = (20.0, 20.0, 20.0),
    new_tokens: tuple[int, int] = (16, 48),
    seed: int = 0,
) -> list[Arrival]:
    """Return requests that arrive at random, at one rate after another: a calm, a burst, a calm.

    Args:
        prompts: taken in turn.
        rates: requests a second in each part.
        seconds: length of each part.
        new_tokens: lowest and highest number of tokens of an answer.

    Raises:
        ValueError: the parts do not fit, a rate is not above 0, or there is no prompt.
    """
    if len(rates) != len(seconds) or not prompts or min(rates) <= 0 or min(seconds) <= 0:
        raise ValueError(
            f"rates are {list(rates)} and seconds {list(seconds)}: give as many of each, above 0, and some prompts."
        )
    draw, arrivals, end, now = random.Random(seed), list[Arrival](), 0.0, 0.0  # noqa: S311
    for rate, length in zip(rates, seconds, strict=True):
        now, end = end, end + length
        while (now := now + draw.expovariate(rate)) < end:
            prompt = prompts[len(arrivals) % len(prompts)]
            arrivals.append(Arrival(now, prompt, draw.randint(*new_tokens)))
    return arrivals


def sample_prompts(words: int, seed: int = 0, count: int = 64) -> list[str]:
    """Return prompts of so many words from the sample text that comes with flextron, no two with one beginning."""
    packed = files("flextron").joinpath("sample", "validation.jsonl.xz").read_bytes()
    lines = lzma.decompress(packed).decode("utf8").splitlines()
    text = " ".join(json.loads(line)["text"] for line in lines).split()
    draw = random.Random(seed)  # noqa: S311
    starts = draw.sample(range(len(text) - words), count)
    return [" ".join(text[start : start + words]) for start in starts]


def load_trace(file: str | Path) -> list[Arrival]:
    """Read a trace: a JSON object a line, with `at`, `prompt`, `max_tokens` and perhaps `budget`.

    Raises:
        FlextronError: a line that cannot be read; the message has its number.
    """
    arrivals = []
    for number, line in enumerate(Path(file).read_text(encoding="utf8").splitlines(), 1):
        try:
            values = json.loads(line)
            arrival = Arrival(
                float(values["at"]), str(values["prompt"]), int(values["max_tokens"]), values.get("budget")
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FlextronError(f"cannot read {file}, line {number}: {error!r}") from None
        arrivals.append(arrival)
    if not arrivals:
        raise FlextronError(f"{file} has no requests.")
    return sorted(arrivals, key=lambda arrival: arrival.at)


def replay(
    target: Target, arrivals: Sequence[Arrival], *, progress: Callable[[int], None] = lambda _: None
) -> list[Outcome]:
    """Send each request at its time, whatever became of those before, and wait for all answers.

    Args:
        progress: called with the number of requests that are done.
    """
    outcomes = [Outcome(arrival) for arrival in arrivals]
    done, lock, start = Counter[str](), threading.Lock(), time.perf_counter()

    def work(outcome: Outcome) -> None:
        _ask(target, outcome)
        with lock:
            done["all"] += 1
            progress(done["all"])

    threads = []
    for outcome in outcomes:
        time.sleep(max(0.0, start + outcome.arrival.at - time.perf_counter()))
        threads.append(threading.Thread(target=work, args=(outcome,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return outcomes


def _ask(target: Target, outcome: Outcome) -> None:
    start, times = time.perf_counter(), list[float]()
    try:
        connection = _connect(target.url)
        body = _body(target, outcome.arrival)
        connection.request("POST", _path(target.url, "/v1/completions"), json.dumps(body), _headers(target))
        answer = connection.getresponse()
        outcome.status = answer.status
        if answer.status != 200:
            outcome.error = answer.read(2000).decode(errors="replace")
            return
        _read_events(answer, outcome, times)
    except (OSError, http.client.HTTPException, ValueError) as error:
        outcome.error = repr(error)
    if times:
        outcome.ttft_ms = 1000 * (times[0] - start)
        outcome.tokens = outcome.tokens or len(times)
        if outcome.tokens > 1:
            outcome.tpot_ms = 1000 * (times[-1] - times[0]) / (outcome.tokens - 1)


def _read_events(answer: http.client.HTTPResponse, outcome: Outcome, times: list[float]) -> None:
    """Note when each piece of text came, and what the server says of its tokens."""
    ended = False
    while line := answer.readline():
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            ended = True
            break
        event = json.loads(data)
        if "error" in event:
            outcome.error = str(event["error"])
        choices = event.get("choices") or []
        if any(choice.get("text") for choice in choices):
            times.append(time.perf_counter())
        if usage := event.get("usage"):
            outcome.tokens = int(usage.get("completion_tokens") or 0)
            outcome.levels = dict((usage.get("flextron") or {}).get("levels") or {})
    if not ended and outcome.error is None:
        outcome.error = "the answer broke off"


def _body(target: Target, arrival: Arrival) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": target.model,
        "prompt": arrival.prompt,
        "max_tokens": arrival.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    budget = arrival.budget or target.budget
    return body if budget is None else body | {"budget": budget}


def _headers(target: Target) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if target.api_key is not None:
        headers["Authorization"] = f"Bearer {target.api_key}"
    if target.send_objectives:
        objectives = {"x-slo-ttft-ms": target.ttft_ms, "x-slo-tpot-ms": target.tpot_ms}
        headers |= {name: f"{value:g}" for name, value in objectives.items() if value is not None}
    return headers


def _connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FlextronError(f"{url} is no address of a server; write one such as http://127.0.0.1:8000.")
    return kind(parts.hostname, parts.port, timeout=_TIMEOUT_SECONDS)


def _path(url: str, path: str) -> str:
    return urlsplit(url).path.rstrip("/").removesuffix("/v1") + path


def ask_server(target: Target, path: str) -> Any:
    """Return what the server says at a path, read as JSON; None where it has no such path.

    Raises:
        FlextronError: it does not answer.
    """
    try:
        connection = _connect(target.url)
        connection.request("GET", _path(target.url, path), headers=_headers(target))
        answer = connection.getresponse()
        return json.loads(answer.read()) if answer.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FlextronError(f"no server answers at {target.url}: {error}") from None


@dataclass(frozen=True)
class Summary:
    """What users of a server saw over a trace."""

    requests: int
    met: int
    attainment: float
    goodput: float
    """Requests a second that met their objectives."""
    refused: int
    failed: int
    tokens_per_second: float
    ttft_ms: tuple[float, float]
    """Median and 95th percentile."""
    tpot_ms: tuple[float, float]
    mean_loss: float | None
    """Mean predicted loss of the levels that wrote the tokens, in nats above the full model; None where unknown."""
    tokens_by_level: Mapping[str, int]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], target: Target, seconds: float, losses: Mapping[str, float]) -> Summary:
        """Sum up a replay that took so many seconds.

        Args:
            losses: predicted loss of each level above the full model's, by its name.
        """
        met = sum(outcome.met(target) for outcome in outcomes)
        levels: Counter[str] = Counter()
        for outcome in outcomes:
            levels.update(outcome.levels)
        known = {name: count for name, count in levels.items() if name in losses}
        total = sum(known.values())
        return cls(
            requests=len(outcomes),
            met=met,
            attainment=met / max(1, len(outcomes)),
            goodput=met / seconds,
            refused=sum(outcome.status in (429, 503) for outcome in outcomes),
            failed=sum(
                outcome.status not in (200, 429, 503) or (outcome.error is not None and outcome.status == 200)
                for outcome in outcomes
            ),
            tokens_per_second=sum(outcome.tokens for outcome in outcomes) / seconds,
            ttft_ms=_middle_and_tail(outcome.ttft_ms for outcome in outcomes),
            tpot_ms=_middle_and_tail(outcome.tpot_ms for outcome in outcomes),
            mean_loss=sum(losses[name] * count for name, count in known.items()) / total if total else None,
            tokens_by_level=dict(levels),
        )

    def lines(self) -> list[str]:
        """Say it for people."""
        loss = (
            ""
            if self.mean_loss is None
            else f"; predicted loss of what was served: {self.mean_loss:.3f} nats above full"
        )
        levels = ", ".join(f"{name} {count}" for name, count in sorted(self.tokens_by_level.items()))
        return [
            f"{self.requests} requests: {self.met} in time ({self.attainment:.0%}), {self.refused} refused, "
            f"{self.failed} failed",
            f"goodput {self.goodput:.2f} requests/s, {self.tokens_per_second:.1f} tokens/s{loss}",
            f"first token {self.ttft_ms[0]:.0f} ms (95%: {self.ttft_ms[1]:.0f}), "
            f"each further one {self.tpot_ms[0]:.0f} ms (95%: {self.tpot_ms[1]:.0f})",
            *([f"tokens by level: {levels}"] if levels else []),
        ]


def losses_of_levels(target: Target) -> dict[str, float]:
    """Return each level's predicted loss above the full model's, of a flextron server; nothing for other servers."""
    answer = ask_server(target, "/v1/flextron/levels")
    levels = answer.get("levels", []) if isinstance(answer, dict) else []
    known = {level["name"]: level["loss"] for level in levels if level.get("loss") is not None}
    return {name: loss - known["full"] for name, loss in known.items()} if "full" in known else {}


def save(file: str | Path, target: Target, outcomes: Sequence[Outcome], summary: Summary) -> None:
    """Write the summary and every request, as JSON."""
    asked = {key: value for key, value in asdict(target).items() if key != "api_key"}
    record = {"target": asked, "summary": asdict(summary), "requests": [asdict(outcome) for outcome in outcomes]}
    write_text(file, json.dumps(record, indent=1) + "\n")


def _middle_and_tail(values: Iterable[float | None]) -> tuple[float, float]:
    known = sorted(value for value in values if value is not None)
    if len(known) < 2:
        return (mean(known), mean(known)) if known else (float("nan"), float("nan"))
    cuts = quantiles(known, n=20, method="inclusive")
    return cuts[9], cuts[18]
