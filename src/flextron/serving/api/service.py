"""`Service`: an engine with a tokenizer, behind OpenAI's API: one coroutine answers one request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from starlette.responses import Response
from starlette.types import Receive
from transformers import PreTrainedTokenizerBase

from flextron.serving.api.answers import Answer, headers_of, to_json
from flextron.serving.api.asking import Ask, Kind, parse_ask
from flextron.serving.api.fields import parse_object
from flextron.serving.api.jobs import Job, Text
from flextron.serving.api.metrics import Metrics
from flextron.serving.api.options import Options
from flextron.serving.api.prompts import Preparing, new_name
from flextron.serving.api.refusal import ApiError
from flextron.serving.api.streaming import Stream, watched
from flextron.serving.api.writing import TokenTexts, Writer, Written
from flextron.serving.engine import Engine

_IGNORED_SHOWN = 200
"""Characters of the header that lists fields without effect."""


class Service:
    """What an engine, a tokenizer and options make of requests."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
        self.engine, self.options = engine, options
        self.metrics = Metrics(engine)
        self.draining = False
        """Whether no more requests are taken."""
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)
        self._preparing = Preparing(engine, tokenizer, options)
        # One thread: tokenizers are not made for several, and the event loop must not wait for a long prompt.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flextron prompts")

    @property
    def state(self) -> str:
        """How it stands: ok, draining or dead."""
        return "draining" if self.draining else "ok" if self.engine.stats().healthy else "dead"

    def close(self) -> None:
        """End its thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def answer(self, kind: Kind, body: bytes, headers: Mapping[str, str], receive: Receive) -> Response:
        """Answer one request. `receive` tells when the client leaves.

        Raises:
            ApiError: the request does not fit, is refused, or fails.
        """
        begun = time.perf_counter()
        try:
            ask = parse_ask(kind, parse_object(body), headers, self.options)
            job, answer = await self._begin(ask, begun)
        except ApiError as error:
            self.metrics.rejected.labels(error.code or "invalid_value").inc()
            raise
        if not ask.stream:
            async with watched(job, receive):
                return await self._whole(job, answer)
        limits = self.options.limits
        times = {"keep_alive": self.options.keep_alive_seconds, "stall": limits.stall_seconds}
        return Stream(job, answer, self.metrics, about=about(answer), **times)

    async def _begin(self, ask: Ask, begun: float) -> tuple[Job, Answer]:
        if self.draining:
            raise ApiError("the server stops; send the request again.", status=503, code="stopped", retry_after=5)
        name = new_name(ask.kind)
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._thread, self._preparing.prepare, ask, name)
        texts = [
            Text(request, granted, Writer(self._tokenizer, request.prompt, ask.stop), begun)
            for request, granted in prepared
        ]
        job = Job(self.engine, self.metrics, texts, seconds=self.options.limits.seconds)
        job.submit()
        for tokens in {request.prompt for request, _ in prepared}:
            self.metrics.prompt_tokens.inc(len(tokens))
        return job, Answer(ask, name, self.engine.levels, self._texts)

    async def _whole(self, job: Job, answer: Answer) -> Response:
        """Wait for all texts and answer at once."""
        written: list[list[Written]] = [[] for _ in job.texts]
        while not job.is_done:
            for place, more in await job.take(self.options.keep_alive_seconds):
                written[place] += more
        if job.gone:
            return Response(status_code=499)  # no one reads it
        reasons = [text.finish or "stop" for text in job.texts]
        usage = job.usage()
        whole = answer.whole(list(zip(written, reasons, strict=True)), usage)
        for reason in reasons:
            self.metrics.requests.labels(reason).inc()
        return Response(to_json(whole), media_type="application/json", headers=headers_of(usage) | about(answer))


def about(answer: Answer) -> dict[str, str]:
    """Return the headers that every answer has."""
    found = {"x-request-id": answer.name}
    if answer.ask.ignored:
        found["x-flextron-ignored"] = ",".join(ascii(name)[1:-1] for name in answer.ask.ignored)[:_IGNORED_SHOWN]
    return found
