"""Time sub-networks in llama.cpp, each exported to a temporary GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from flextron.costs.saved import LLAMA_CPP
from flextron.costs.timing import Runner
from flextron.elastic.model import ElasticModel
from flextron.environment import describe_device
from flextron.errors import ExportError
from flextron.exporting.checking import real_text
from flextron.exporting.gguf.dialects import context_length, states_unequal_layers
from flextron.exporting.gguf.engine import LlamaCpp
from flextron.exporting.gguf.file import export_gguf
from flextron.subnet import Subnet

NEW_TOKENS = 8
"""Number of tokens that one run writes after the cached context."""
_REPEATS = {"prefill": 1, "decode": 3}


@contextmanager
def in_llamacpp(model: ElasticModel, *, phase: str, tokens: int, quantize: str = "f16") -> Iterator[Runner]:
    """Yield the runner with which `measure_latency` times llama.cpp, at batch 1 with torch's number of threads.

    Args:
        phase: "prefill" times a prompt of `tokens` tokens; "decode" times one more token after them.
        quantize: type of the weights, as for `export_gguf`.

    Raises:
        ExportError: a GGUF file cannot express unequal layers of this model, there is no tokenizer, or `tokens` is too
            long for the model.
        FlextronError: llama.cpp is not installed.
    """
    if not states_unequal_layers(model):
        raise ExportError(
            f"llama.cpp needs one width for all layers of {model.config.model_type}, but a latency table is fitted to "
            "unequal widths. Time equal widths yourself and pass them with --from-csv FILE --engine llamacpp."
        )
    needed = tokens + NEW_TOKENS + 1
    if model.tokenizer is None or needed > context_length(model):
        reason = "no tokenizer" if model.tokenizer is None else f"only {context_length(model)} positions"
        raise ExportError(f"llama.cpp cannot be timed on {tokens} + {NEW_TOKENS} tokens: this model has {reason}.")
    text, numbers = real_text(model.tokenizer, tokens)[1], count()
    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:

        def prepare(subnet: Subnet) -> Callable[[], float]:
            file = Path(folder) / f"{next(numbers)}.gguf"
            export_gguf(model, subnet, file, quantize=quantize, verify=False)
            engine = LlamaCpp(file, context=needed, threads=threads)
            file.unlink()  # llama.cpp has loaded it
            if phase == "prefill":
                return lambda: engine.prompt_ms(text)
            return lambda: engine.token_ms(text, NEW_TOKENS)

        about = {
            "device": describe_device("cpu"),
            "engine": f"{LLAMA_CPP} (xllamacpp {version('xllamacpp')})",
            "quantization": quantize,
        }
        yield Runner(prepare, _REPEATS[phase], about)
