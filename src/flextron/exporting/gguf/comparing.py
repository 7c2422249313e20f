"""Whether another engine computes what the elastic model does: tokens, next tokens and greedy text of a real text.

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
"""Next tokens that an export compares."""
GREEDY_TOKENS = 16
_PROMPT_TOKENS = 16
_LEAST_AGREEMENT = 0.5
"""Of quantised weights, whose next tokens differ here and there."""
_TOLERANCES = {"F32": 1e-2, "F16": 0.2, "BF16": 1.0}
"""Nats by which another next token may be less likely by the elastic model: a tie, by the type of the weights."""
_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class EngineCheck:
    """How an engine's answers compare with the elastic model's."""

    positions: int
    agreement: float
    """Share of the positions with the same likeliest next token."""
    largest_difference: float
    """Of the likeliest token's log-probability, in nats."""
    greedy_tokens: int
    """Tokens of greedy text that are the same, of those that were written."""
    greedy_written: int

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
        context: most tokens that the file is good for.
        kind: type of the weights in the file, as `gguf` names it.

    Raises:
        ExportError: llama.cpp does not load the file, or computes something else.
    """
    text, tokens = real_text(tokenizer, max(1, min(POSITIONS, context - GREEDY_TOKENS - 1)))
    try:
        with LlamaCpp(file, context=len(tokens) + GREEDY_TOKENS + 1, exact=kind == "F32") as engine:
            _check_tokenizer(tokenizer, engine, text)
            found = [engine.next_token(tokens[: place + 1]) for place in range(len(tokens))]
            written = engine.greedy(tokens[:_PROMPT_TOKENS], GREEDY_TOKENS)
    except ExportError:
        raise
    except FlextronError as error:
        raise ExportError(f"the exported file does not run: {error}. Nothing was kept; please report it.") from error
    return _compare(model, subnet, tokens, found, written, kind)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, engine: LlamaCpp, text: str) -> None:
    wanted = tokenizer(text, add_special_tokens=False).input_ids
    found = engine.tokenize(text)
    if wanted != found:
        at = next((place for place, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), len(wanted))
        raise ExportError(
            f"llama.cpp reads a text as other tokens from number {at} on: {found[at : at + 4]} in place of "
            f"{wanted[at : at + 4]}. Nothing was kept; please report it, or use --to hf."
        )


@torch.inference_mode()
def _compare(
    model: ElasticModel,
    subnet: Subnet,
    tokens: list[int],
    found: list[tuple[int, float | None]],
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
    ids_T = torch.tensor([token for token, _ in found])
    lost = (best_T.values - nats_TV.gather(1, ids_T[:, None])[:, 0]).max().item()
    wanted = texts[0, prompt.shape[1] :].tolist()
    same = next((place for place, (a, b) in enumerate(zip(written, wanted, strict=False)) if a != b), len(written))
    check = EngineCheck(
        positions=len(found),
        agreement=(ids_T == best_T.indices).float().mean().item(),
        largest_difference=max(
            (
                abs(nats - row[token].item())
                for (token, nats), row in zip(found, nats_TV, strict=True)
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
        agrees = check.agreement >= _LEAST_AGREEMENT
    if not agrees:
        raise ExportError(
            f"the exported file computes something else: {check}, and its choices are up to {lost:.3g} nats less "
            "likely. Nothing was kept; please report it."
        )
    return check
