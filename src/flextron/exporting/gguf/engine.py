"""Run a GGUF file in llama.cpp (package `xllamacpp`): next tokens, greedy text and times."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flextron.errors import FlextronError

_SECONDS = 60
_SILENT = -1


def is_installed() -> bool:
    """Return whether xllamacpp is installed."""
    return find_spec("xllamacpp") is not None


@dataclass(frozen=True)
class EngineTimes:
    """Times of one request, as llama.cpp reports them."""

    prompt_ms: float
    per_token_ms: float
    """Mean time of the new tokens, without the first, which comes with the prompt."""


class LlamaCpp:
    """A GGUF file loaded in llama.cpp, for one sequence on a CPU. Call `close`, or use a `with` block."""

    def __init__(self, file: str | Path, *, context: int, threads: int = 1, exact: bool = False) -> None:
        """Load a file.

        Args:
            context: largest number of tokens in a request, prompt and answer together.
            threads: number of CPU threads.
            exact: keep keys and values in fp32 and use plain attention, so that results can be compared.

        Raises:
            FlextronError: xllamacpp is not installed, or llama.cpp does not load the file.
        """
        if not is_installed():
            raise FlextronError('llama.cpp is not installed. Run: pip install "flextron[llamacpp]"')
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity, params.warmup, params.fit_params, params.cache_ram_mib = _SILENT, False, False, 0
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise FlextronError(f"llama.cpp does not load {file}: {error}") from None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the engine's memory."""
        self._server = None

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text by the file's tokenizer, without adding special tokens."""
        request = urllib.request.Request(  # noqa: S310  # the server listens on this machine
            f"{self._server.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": False}).encode(),
            {"Content-Type": "application/json"},
        )
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with without_proxy.open(request, timeout=_SECONDS) as answer:
                return list(json.load(answer)["tokens"])
        except OSError as error:
            raise FlextronError(f"llama.cpp does not answer: {error}") from None

    def next_token(self, tokens: Sequence[int]) -> tuple[int, float | None]:
        """Return the most likely token after `tokens` and its log-probability.

        The log-probability is None if the token's bytes are not yet a whole character.
        """
        answer = self._complete(tokens, 1, n_probs=1)
        likely = answer.get("completion_probabilities")
        return int(answer["tokens"][0]), float(likely[0]["top_logprobs"][0]["logprob"]) if likely else None

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to `count` greedy tokens after `tokens`; fewer if the text ends."""
        return [int(token) for token in self._complete(tokens, count)["tokens"]]

    def times(self, tokens: Sequence[int], count: int) -> EngineTimes:
        """Return the times to read `tokens`, without a cache, and to write `count` more, which must be at least 2."""
        timings = self._complete(tokens, count, cache_prompt=False, ignore_eos=True)["timings"]
        return EngineTimes(timings["prompt_ms"], timings["predicted_ms"] / (timings["predicted_n"] - 1))

    def prompt_ms(self, tokens: Sequence[int]) -> float:
        """Return the time to read `tokens` without a cache, in ms."""
        return float(self._complete(tokens, 1, cache_prompt=False)["timings"]["prompt_ms"])

    def token_ms(self, tokens: Sequence[int], count: int) -> float:
        """Return the mean time in ms of `count` tokens after `tokens`, which are cached from the second call on."""
        timings = self._complete(tokens, count + 1, ignore_eos=True)["timings"]
        return float(timings["predicted_ms"]) / count  # the first token comes with the prompt

    def _complete(self, tokens: Sequence[int], count: int, **options: Any) -> Any:
        request = {"prompt": list(map(int, tokens)), "max_tokens": count, "temperature": 0, "top_k": 1}
        request |= {"cache_prompt": True, "return_tokens": True, "verbose": True, **options}
        answer = self._server.handle_completions(request)
        if "__verbose" not in answer:
            raise FlextronError(f"llama.cpp answered with an error: {answer}")
        return {"timings": answer["timings"], **answer["__verbose"]}
