"""`Stream`: an answer as server-sent events, and the watch over a client that may leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flextron.serving.api.answers import DONE, KEEP_ALIVE, Answer, event, to_json
from flextron.serving.api.jobs import Job
from flextron.serving.api.metrics import Metrics
from flextron.serving.api.refusal import ApiError


def refused(error: ApiError) -> Response:
    """Return the answer to a request that is refused or has failed."""
    return Response(to_json(error.body()), error.status, headers=error.headers(), media_type="application/json")


@asynccontextmanager
async def watched(job: Job, receive: Receive) -> AsyncIterator[None]:
    """Cancel the job's texts when the client leaves, and at the end of the block those that go on."""
    watch = asyncio.create_task(_watch(job, receive))
    try:
        yield
    finally:
        watch.cancel()
        job.cancel()


async def _watch(job: Job, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.abandon()


class Stream(Response):
    """Sends each piece of text as it comes, comments while none comes, then the usage and `[DONE]`."""

    def __init__(
        self,
        job: Job,
        answer: Answer,
        metrics: Metrics,
        *,
        about: Mapping[str, str],
        keep_alive: float,
        stall: float,
    ) -> None:
        """Prepare to send; `about` are headers beside those of every stream, the times are in seconds."""
        self._about = about
        self._job, self._answer, self._metrics = job, answer, metrics
        self._keep_alive, self._stall = keep_alive, stall
        self._ended: set[int] = set()
        self._sent_at = time.perf_counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; as an error with its status where no text is there yet."""
        async with watched(self._job, receive):
            try:
                first = await self._next()
            except ApiError as error:
                await refused(error)(scope, receive, send)
                return
            with suppress(TimeoutError):  # of a client that reads nothing for so long: it is left
                await self._send_all(first, send)

    async def _send_all(self, data: bytes, send: Send) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **self._about}
        headers["x-accel-buffering"] = "no"  # nginx would gather pieces
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        await self._send(self._answer.opening(len(self._job.texts)) + data, send)
        while not self._job.is_done:
            try:
                data = await self._next()
            except ApiError as error:
                self._metrics.requests.labels(str(error.status)).inc()
                await self._send(event(error.body()) + DONE, send, more=False)
                return
            await self._send(data, send)
        if not self._job.gone:
            await self._send(self._last(), send, more=False)

    async def _next(self) -> bytes:
        """Return the events of what is written next; after a while without any, a comment."""
        chunks = []
        for index, written in await self._job.take(self._keep_alive):
            choice = self._answer.piece(index, written) if written else None
            if choice is not None:
                chunks.append(self._answer.chunk([choice]))
        for index, text in enumerate(self._job.texts):
            if text.finish is not None and index not in self._ended:
                self._ended.add(index)
                chunks.append(self._ending(index, text.finish))
        if not chunks and time.perf_counter() - self._sent_at >= self._keep_alive:
            return KEEP_ALIVE
        return b"".join(chunks)

    def _ending(self, index: int, reason: str) -> bytes:
        """Return the last chunk of a text. The very last has the usage, unless the client wants a chunk for that."""
        self._metrics.requests.labels(reason).inc()
        last = len(self._ended) == len(self._job.texts) and not self._answer.ask.include_usage
        return self._answer.chunk([self._answer.ending(index, reason)], self._job.usage() if last else None)

    def _last(self) -> bytes:
        usage = self._answer.chunk([], self._job.usage()) if self._answer.ask.include_usage else b""
        return usage + DONE

    async def _send(self, data: bytes, send: Send, *, more: bool = True) -> None:
        """Send events, and wait while the client is slow.

        Raises:
            TimeoutError: it took nothing for too long; its texts are cancelled.
        """
        if not data:
            return
        try:
            with anyio.fail_after(self._stall):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            self._job.abandon()
            raise
        self._sent_at = time.perf_counter()
