"""`flextron generate`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from flextron.commands import shared
from flextron.config import GenerateConfig

if TYPE_CHECKING:
    from flextron.inference.speculative import Draft
    from flextron.model import ElasticModel


def run(config: GenerateConfig) -> None:
    """Go on from a prompt."""
    with shared.outputs(config.picture):
        _run(config)


def _run(config: GenerateConfig) -> None:
    from flextron.generation import compare_speculative, generate

    model = shared.load(config)
    routing = shared.tokens_within(model, str(config.budget), config) if config.per_token else None
    options: dict[str, Any] = {"subnet": None if routing else shared.chosen(model, config)}
    options |= {"max_new_tokens": config.max_new_tokens, "chat": config.chat}
    draft = _draft(model, config)
    start = time.monotonic()
    written = generate(
        model,
        config.prompt,
        routing=routing,
        speculative=draft,
        temperature=config.temperature,
        seed=config.seed,
        stream=True,
        **options,
    )
    if draft is not None:
        shared.note(f"{draft}; {draft.written / (time.monotonic() - start):.1f} tokens/s with the prompt")
    if draft is not None and config.compare:
        speed_up, equal = compare_speculative(model, config.prompt, draft, **options)
        shared.note(f"{speed_up:.2f} times as fast as plain greedy decoding, {'the same' if equal else 'another'} text")
    if routing is not None:
        shared.note(f"tokens cost {routing.average_cost:.3f}x of the full model on average, by the latency table")
    if routing is not None and config.picture is not None:
        shared.show_usage(model, routing, config.prompt + written, str(config.budget), config.picture)


def _draft(model: ElasticModel, config: GenerateConfig) -> Draft | None:
    """What --speculative asks for."""
    from flextron.choosing.choice import choose
    from flextron.config.fields import names_widths
    from flextron.inference.speculative import Draft

    wish = config.speculative
    if wish is None:
        return None
    subnet = choose(model, wish, config.model) if names_widths(wish) else shared.within(model, wish, config)
    return Draft(subnet, config.draft_tokens)
