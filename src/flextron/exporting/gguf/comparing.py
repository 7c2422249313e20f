"""Compare llama.cpp with the elastic model on a real text: its tokens, next tokens and greedy text.

Shapes: T time, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from flextron.elastic.model import ElasticModel
from flextron.errors import ExportError, FlextronError
from flextron.exporting.checking import evaluating, real_text
from flextron.exporting.gguf.engine import LlamaCpp
from flextron.subnet import Subnet

POSITIONS = 64
"""Number of next tokens that an export compares."""
GREEDY_TOKENS = 16
_PROMPT_TOKENS = 16
_LEAST_AGREEMENT = 0.5
"""Lowest share of equal next tokens that quantised weights must reach; quantisation changes a few."""
_TOLERANCES = {"F32": 1e-2, "F16": 0.2, "BF16": 1.0}
"""By weight type: largest gap in nats, for the elastic model, between its best token and llama.cpp's."""
_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class EngineCheck:
    """How llama.cpp's results compare with the elastic model's."""

    positions: int
    """Number of next tokens compared."""
    agreement: float
    """Share of positions with the same most likely next token, 0 to 1."""
    largest_difference: float
    """Largest difference of the most likely token's log-probability, in nats."""
    greedy_tokens: int
    """Number of greedy tokens before the first difference."""
    greedy_written: int
    """Number of greedy tokens that llama.cpp wrote."""

    def __str__(self) -> str:
        return (
            f"loaded in llama.cpp: same next token at {self.agreement:.1%} of {self.positions} positions, "
            f"log-probabilities within {self.largest_difference:.2g}; "
            f"same greedy text for {self.greedy_tokens} of {self.greedy_written} tokens"
        )


def check_in_llamacpp(
    model: ElasticModel,
    tokenizer: PreTrainedTokenizerBase,
    subnet: Subnet,
    file: Path,
    *,
    context: int,
    kind: str,
) -> EngineCheck:
    """Compare a GGUF file in llama.cpp with `model` as `subnet`.

    Args:
        context: longest context of the file, in tokens.
        kind: type of the weights in the file, as `gguf` names it.

    Raises:
        ExportError: llama.cpp does not load the file, or computes something else.
    """
    text, tokens = real_text(tokenizer, max(1, min(POSITIONS, context - GREEDY_TOKENS - 1)))
    try:
        with LlamaCpp(file, context=len(tokens) + GREEDY_TOKENS + 1, exact=kind == "F32") as engine:
            _check_tokenizer(tokenizer, engine, text)
            answers = [engine.next_token(tokens[:end]) for end in range(1, len(tokens) + 1)]
            written = engine.greedy(tokens[:_PROMPT_TOKENS], GREEDY_TOKENS)
    except ExportError:
        raise
    except FlextronError as error:
        raise ExportError(f"the exported file does not run: {error}. Nothing was kept; please report it.") from error
    return _compare(model, subnet, tokens, answers, written, kind)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, engine: LlamaCpp, text: str) -> None:
    expected = tokenizer(text, add_special_tokens=False).input_ids
    actual = engine.tokenize(text)
    if expected != actual:
        at = _equal_tokens(expected, actual)
        raise ExportError(
            f"llama.cpp splits a text into other tokens, from token {at} on: {actual[at : at + 4]} instead of "
            f"{expected[at : at + 4]}. Nothing was kept; please report it, or use --to hf."
        )


def _equal_tokens(first: list[int], second: list[int]) -> int:
    """Return the number of tokens before the first difference."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


@torch.inference_mode()
def _compare(
    model: ElasticModel,
    subnet: Subnet,
    tokens: list[int],
    answers: list[tuple[int, float | None]],
    written: list[int],
    kind: str,
) -> EngineCheck:
    tokens_1T = torch.tensor([tokens], device=model.device)
    with model.use(subnet), evaluating(model.lm):
        nats_TV = model(tokens_1T).logits[0].float().log_softmax(-1).cpu()
        prompt = tokens_1T[:, :_PROMPT_TOKENS]
        ids = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
        texts = model.generate(prompt, do_sample=False, max_new_tokens=max(1, len(written)), eos_token_id=None, **ids)
    best_T = nats_TV.max(-1)
    ids_T = torch.tensor([token for token, _ in answers])
    lost = (best_T.values - nats_TV.gather(1, ids_T[:, None])[:, 0]).max().item()
    same = _equal_tokens(written, texts[0, prompt.shape[1] :].tolist())
    check = EngineCheck(
        positions=len(answers),
        agreement=(ids_T == best_T.indices).float().mean().item(),
        largest_difference=max(
            (
                abs(nats - row[token].item())
                for (token, nats), row in zip(answers, nats_TV, strict=True)
                if nats is not None
            ),
            default=math.nan,
        ),
        greedy_tokens=same,
        greedy_written=len(written),
    )
    if kind in _TOLERANCES:
        agrees = lost <= max(_TOLERANCES[kind], _TOLERANCES[_TYPES.get(model.dtype, "F32")])
    else:
        if check.agreement < _LEAST_AGREEMENT:
            raise ExportError(
                f"{kind} loses too much of this sub-network: {check}, and it should be at least {_LEAST_AGREEMENT:.0%} "
                "of the next tokens. Nothing was kept. Take a finer type, such as --quantize q8_0, or a larger or "
                "trained sub-network."
            )
        return check
    if not agrees:
        raise ExportError(
            f"the exported file computes something else: {check}, and the elastic model finds its next tokens up to "
            f"{lost:.3g} nats less likely. Nothing was kept; please report it."
        )
    return check
