"""`flextron evaluate`, `generate`, `export`, `quickstart` and `env`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flextron.commands import loading
from flextron.config import EnvConfig, EvaluateConfig, ExportConfig, GenerateConfig, QuickstartConfig
from flextron.errors import BudgetError

if TYPE_CHECKING:
    from flextron.elastic.model import ElasticModel
    from flextron.inference.speculative import Draft
    from flextron.subnet import Subnet


def run_evaluate(config: EvaluateConfig) -> None:
    """Losses of sub-networks on a text, or accuracies on tasks."""
    from flextron.choosing.choice import choose
    from flextron.data.blocks import load_blocks
    from flextron.evaluation import evaluate

    model = loading.load(config)
    if config.tasks:
        from flextron.tasks.command import evaluate_on_tasks

        print(evaluate_on_tasks(model, config, warn=loading.note))
        return
    subnets = [choose(model, wish, config.model) for wish in config.subnet]
    subnets += [loading.within(model, budget, config) for budget in config.budget]
    names = [*config.subnet, *config.budget]
    routings = [loading.tokens_within(model, budget, config) for budget in config.budget if config.per_token]
    names += [f"{budget} per token" for budget in config.budget if config.per_token]
    blocks = load_blocks(model.tokenizer, config.text, tokens=config.tokens, block_tokens=config.block_tokens)
    results = evaluate(model, [*subnets, *routings], blocks, show=True)
    costs = [None] * len(subnets) + [routing.average_cost for routing in routings]
    if config.json:
        rows = [
            {"name": name, "cost": cost, **asdict(result)}
            for name, cost, result in zip(names, costs, results, strict=True)
        ]
        numbers = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # no NaN
        print(json.dumps(numbers, indent=1, allow_nan=False))
        return
    print(f"{results[0].tokens} tokens of {config.text}; ± is the standard error over blocks of {config.block_tokens}")
    print(f"{'sub-network':<28}{'share':>7}{'nats/token':>18}{'bits/byte':>11}   above {names[0]}")
    for name, result in zip(names, results, strict=True):
        loss = f"{result.nats_per_token:.4f} ±{result.standard_error:.4f}"
        above = f"{result.difference:+.4f} ±{result.difference_standard_error:.4f}"
        print(f"{name:<28}{result.share:>7.1%}{loss:>18}{result.bits_per_byte:>11.4f}   {above}")
    for name, cost in zip(names, costs, strict=True):
        if cost is not None:
            print(f"{name}: its tokens cost {cost:.3f}x of the full model on average, by the latency table")
    if config.picture is not None:
        text = model.tokenizer.decode(blocks.tokens[0])  # type: ignore[union-attr]
        loading.show_usage(model, routings[-1], text, config.budget[-1], config.picture)


def run_generate(config: GenerateConfig) -> None:
    """Go on from a prompt."""
    from flextron.generation import compare_speculative, generate

    model = loading.load(config)
    routing = loading.tokens_within(model, str(config.budget), config) if config.per_token else None
    options: dict[str, Any] = {"subnet": None if routing else loading.chosen(model, config)}
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
        loading.note(f"{draft}; {draft.written / (time.monotonic() - start):.1f} tokens/s with the prompt")
    if draft is not None and config.compare:
        speed_up, equal = compare_speculative(model, config.prompt, draft, **options)
        loading.note(
            f"{speed_up:.2f} times as fast as plain greedy decoding, {'the same' if equal else 'another'} text"
        )
    if routing is not None:
        loading.note(f"tokens cost {routing.average_cost:.3f}x of the full model on average, by the latency table")
    if routing is not None and config.picture is not None:
        loading.show_usage(model, routing, config.prompt + written, str(config.budget), config.picture)


def _draft(model: ElasticModel, config: GenerateConfig) -> Draft | None:
    """What --speculative asks for."""
    from flextron.choosing.choice import choose
    from flextron.config.fields import names_widths
    from flextron.inference.speculative import Draft

    wish = config.speculative
    if wish is None:
        return None
    subnet = choose(model, wish, config.model) if names_widths(wish) else loading.within(model, wish, config)
    return Draft(subnet, config.draft_tokens)


def run_export(config: ExportConfig) -> None:
    """Write a sub-network as a model of its own."""
    from flextron.exporting import check_free, export, export_gguf

    check_free(config.out, to=config.to, overwrite=config.overwrite)
    model = loading.load(config)
    subnet = _to_export(model, config)
    how: dict[str, Any] = {"overwrite": config.overwrite, "verify": config.verify}
    if config.to == "gguf":
        print(export_gguf(model, subnet, config.out, quantize=config.quantize, **how))
    else:
        print(export(model, subnet, config.out, remote_code=config.remote_code, **how))


def _to_export(model: ElasticModel, config: ExportConfig) -> Subnet:
    """The sub-network that --subnet, --budget and --equal-widths ask for."""
    if not config.equal_widths:
        return loading.chosen(model, config)
    from flextron.choosing.baselines import equal_widths_within
    from flextron.costs.pricing import Ceiling, formula_table
    from flextron.exporting import can_state, refuse_in_gguf

    if config.budget is not None:
        limits = loading.routed(model, config.budget, config).ceilings
    else:
        table = formula_table(model, "parameters")
        limits = (Ceiling(table, table.price(loading.chosen(model, config)), f"the parameters of {config.subnet}"),)
    step = config.neuron_step or 1

    def fits(subnet: Subnet) -> bool:
        neurons = subnet.neurons[0]
        rounded = neurons % step == 0 or neurons == model.search_space.neurons[-1]
        return rounded and can_state(model, subnet, to=config.to, quantize=config.quantize)

    try:
        return equal_widths_within(limits, fits)
    except BudgetError:
        if config.to == "gguf":  # no widths at all can be stated: say why
            refuse_in_gguf(model, model.search_space.full, config.quantize)
        raise


def run_quickstart(config: QuickstartConfig) -> None:
    """The whole way on one model."""
    from flextron.demo.quickstart import quickstart

    quickstart(config)


def run_env(config: EnvConfig) -> None:
    """Print versions and hardware."""
    del config
    from flextron.environment import describe_environment

    print(describe_environment())
