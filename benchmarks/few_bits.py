"""What weights in bfloat16, 8 and 4 bits lose: loss, agreement of the next token with float32, and bytes, by size.

    python benchmarks/few_bits.py smollm2-elastic
    python benchmarks/few_bits.py out/trained --text wikitext.jsonl

Each type holds all sub-networks at once. A sub-network's next tokens are compared with its own in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from flextron import ElasticModel, choose, evaluate
from flextron.costs.formulas import formula_table
from flextron.data.blocks import TokenBlocks, load_blocks
from flextron.elastic.checkpoint import quiet_transformers
from flextron.environment import describe_environment
from flextron.subnet import Subnet
from model import write_results


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    model: tyro.conf.Positional[str]
    """Elastic checkpoint or pack."""
    text: str = "sample/validation"
    """Text to measure on."""
    tokens: int = 2048
    """Number of tokens of it."""
    subnets: tuple[str, ...] = ("full", "90%", "80%", "60%", "50%")
    """Sub-networks to measure."""
    dtypes: tuple[str, ...] = ("bfloat16", "int8", "int4")
    """Types to compare with float32."""
    out: Path | None = None
    """JSON file to write."""


def main(settings: Settings) -> None:
    """Measure and print tables."""
    print(describe_environment())
    quiet_transformers()
    losses: dict[str, list[float]] = {}
    agreement: dict[str, list[float]] = {}
    megabytes: dict[str, float] = {}
    reference: list[torch.Tensor] = []
    for dtype in ("float32", *settings.dtypes):
        model = ElasticModel.from_pretrained(settings.model, dtype=dtype)
        blocks = load_blocks(model.tokenizer, settings.text, tokens=settings.tokens)
        subnets = [choose(model, name, model.folder) for name in settings.subnets]
        losses[dtype] = [found.nats_per_token for found in evaluate(model, subnets, blocks)]
        predicted = [_next_tokens(model, subnet, blocks) for subnet in subnets]
        reference = reference or predicted
        pairs = zip(predicted, reference, strict=True)
        agreement[dtype] = [(one == other).float().mean().item() for one, other in pairs]
        megabytes[dtype] = formula_table(model, "weights").price(model.search_space.full) / 1e6
        print(f"{dtype}: {_row(losses[dtype], '.3f')}", flush=True)
    print(f"\n{settings.model}, {blocks.predicted_tokens} tokens of {settings.text}")
    print("Nats per token (share of next tokens as in float32)\n")
    print("| | MB | " + " | ".join(settings.subnets) + " |\n|---|---:|" + "---:|" * len(settings.subnets))
    for dtype, row in losses.items():
        cells = (f"{loss:.3f} ({share:.1%})" for loss, share in zip(row, agreement[dtype], strict=True))
        print(f"| {dtype} | {megabytes[dtype]:.0f} | " + " | ".join(cells) + " |")
    write_results(settings.out, {"nats": losses, "agreement": agreement, "megabytes": megabytes})


@torch.inference_mode()
def _next_tokens(model: ElasticModel, subnet: Subnet, blocks: TokenBlocks) -> torch.Tensor:
    with model.use(subnet):
        return torch.cat([model(row_1T).logits.argmax(-1) for row_1T in blocks.tokens.split(1)])


def _row(values: list[float], form: str) -> str:
    return " ".join(format(value, form) for value in values)


if __name__ == "__main__":
    main(tyro.cli(Settings))
