"""A real engine that is slow on purpose of being simple: one request after the other, each alone on its sub-network."""

import threading
import time
from collections import deque

import torch

from flextron.inference.decoder import Decoder
from flextron.serving.engine import End, Level, QueueFullError, Stats, StoppedError, Token
from flextron.subnet import Subnet


def make_levels(model, shares=(0.4, 0.6, 0.8, 1.0), *, timed=True) -> list[Level]:
    """Nested sub-networks of about these shares, priced by their MLP neurons; times are made up, loss too."""
    full = model.search_space
    levels = []
    for share in shares:
        width = max(w for w in full.neurons if w <= share * full.neurons[-1])
        subnet = Subnet((width,) * full.layers, (full.kv_groups[-1],) * full.layers)
        name = "full" if share == 1 else f"{share:g}x"
        times = (10 * share, 2 * share) if timed else (None, None)
        levels.append(Level(name, share, subnet, 3.0 - share, *times))
    return levels


class OneByOne:
    """Follows `flextron.serving.engine.Engine`."""

    def __init__(self, model, levels, *, max_queue=256, step_seconds=0.0):
        self.model, self.levels = model, levels
        self.max_length = model.config.max_position_embeddings
        self.max_queue, self.step_seconds = max_queue, step_seconds
        self.fail = None
        """An error to raise in the next step."""
        self.cap = len(levels) - 1
        self._waiting = deque()
        self._now = None
        self._cancelled = set()
        self._changed = threading.Condition()
        self._stopping = self._dead = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.steps = 0

    def start(self):
        self._thread.start()

    def submit(self, request, handler):
        if len(request.prompt) + request.max_new_tokens > self.max_length:
            raise ValueError(f"{len(request.prompt)} tokens of prompt are too many for {self.max_length}.")
        with self._changed:
            if self._stopping or self._dead:
                raise StoppedError("the engine has stopped.")
            if len(self._waiting) >= self.max_queue:
                raise QueueFullError(f"{len(self._waiting)} requests wait, as many as may.", retry_after=2.5)
            self._waiting.append((request, handler, time.perf_counter()))
            self._changed.notify_all()

    def cancel(self, request_id):
        with self._changed:
            if any(request.id == request_id for request, *_ in (*self._waiting, *([self._now] if self._now else []))):
                self._cancelled.add(request_id)

    def set_cap(self, level):
        self.cap = len(self.levels) - 1 if level is None else level

    def stats(self):
        with self._changed:
            running = int(self._now is not None)
            by_level = [0] * len(self.levels)
            if self._now is not None:
                by_level[self._now[0].level] = 1
            return Stats(
                running, len(self._waiting), self.cap, by_level, 1.0, 0.0, 0.0, self.steps, 0, 0, not self._dead
            )

    def stop(self, drain_seconds=0.0):
        until = time.monotonic() + drain_seconds
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._now is None and not self._waiting, max(0, until - time.monotonic()))
            for request, *_ in (*self._waiting, *([self._now] if self._now else [])):
                self._cancelled.add(request.id)
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def die(self):
        with self._changed:
            self._dead = True

    def _run(self):
        while True:
            with self._changed:
                self._now = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if not self._waiting:
                    return
                self._now = self._waiting.popleft()
            request, handler, submitted = self._now
            begun = time.perf_counter()
            try:
                reason, error = self._write(request, handler), None
            except Exception as problem:
                reason, error = "error", str(problem)
            self._cancelled.discard(request.id)
            handler(End(reason, error, queued_ms=1000 * (begun - submitted)))

    def _write(self, request, handler):
        if request.id in self._cancelled:
            return "cancelled"
        level = max(min(request.level, self.cap), request.floor)
        written, draw = [], torch.Generator()
        if request.sampling.seed is not None:
            draw.manual_seed(request.sampling.seed % 2**63)
        else:
            draw.seed()
        decoder, logits_V = self._prefilled(level, [*request.prompt], request)
        while True:
            self.steps += 1
            time.sleep(self.step_seconds)
            if self.fail is not None:
                error, self.fail = self.fail, None
                raise error
            token, logprob, top = _choose(logits_V, request, written, draw)
            if request.constraint is not None:
                request.constraint.accept(token)
            if token in request.stop_tokens:
                return "stop"
            written.append(token)
            handler(Token(token, level, time.perf_counter(), logprob, top))
            if len(written) == request.max_new_tokens:
                return "length"
            if request.id in self._cancelled:
                return "cancelled"
            then = request.then
            if then is not None and tuple(written[-len(then.after) :]) == then.after and level != then.level:
                level = then.level
                decoder, logits_V = self._prefilled(level, [*request.prompt, *written], request)
            else:
                logits_V = decoder.step(token)

    def _prefilled(self, level, tokens, request):
        longest = len(request.prompt) + request.max_new_tokens
        decoder = Decoder(self.model, self.levels[level].subnet, max_tokens=longest)
        return decoder, decoder.prefill(torch.tensor([tokens]))


def _choose(logits_V, request, written, draw):
    sampling = request.sampling
    scores_V = logits_V.float().clone()
    for token in {*request.prompt, *written}:
        factor = sampling.repetition_penalty
        scores_V[token] = scores_V[token] / factor if scores_V[token] > 0 else scores_V[token] * factor
    for token in set(written):
        scores_V[token] -= sampling.presence_penalty + sampling.frequency_penalty * written.count(token)
    for token, bias in sampling.logit_bias.items():
        scores_V[token] += bias
    if request.constraint is not None:
        scores_V[~request.constraint.allowed()] = -torch.inf
    logprobs_V = scores_V.log_softmax(-1)
    token = int(scores_V.argmax()) if not sampling.temperature else _draw(scores_V, sampling, draw)
    if sampling.top_logprobs is None:
        return token, None, ()
    best = logprobs_V.topk(sampling.top_logprobs) if sampling.top_logprobs else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return token, float(logprobs_V[token]), top


def _draw(scores_V, sampling, draw):
    scores_V = scores_V / sampling.temperature
    if sampling.top_k:
        scores_V[scores_V < scores_V.topk(min(sampling.top_k, len(scores_V))).values[-1]] = -torch.inf
    chances, order = scores_V.softmax(-1).sort(descending=True)
    chances[chances.cumsum(-1) - chances > sampling.top_p] = 0
    return int(order[torch.multinomial(chances, 1, generator=draw)])
