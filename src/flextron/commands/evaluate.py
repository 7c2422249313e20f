"""`flextron evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict

from flextron.commands import shared
from flextron.config import EvaluateConfig


def run(config: EvaluateConfig) -> None:
    """Losses of sub-networks on a text, or accuracies on tasks."""
    if config.tasks:
        from flextron.tasks.names import check_names, data_folder

        check_names(config.tasks, data_folder(config.task_data))
    results = None if config.out_dir is None else config.out_dir / "results.json"
    with shared.outputs(config.picture, results):
        _run(config)


def _run(config: EvaluateConfig) -> None:
    from flextron.choosing.choice import choose
    from flextron.data.blocks import load_blocks
    from flextron.evaluation import evaluate

    model = shared.load(config)
    if config.tasks:
        from flextron.tasks.command import evaluate_on_tasks

        print(evaluate_on_tasks(model, config, original=shared.load_original(config), warn=shared.note))
        return
    subnets = [choose(model, wish, config.model) for wish in config.subnet]
    answers = [shared.routed(model, budget, config) for budget in config.budget]
    for text in dict.fromkeys(text for answer in answers for text in answer.notes):
        shared.note(text)
    subnets += [answer.subnet for answer in answers]
    names = [*config.subnet, *config.budget]
    routings = [shared.tokens_within(model, budget, config) for budget in config.budget if config.per_token]
    names += [f"{budget} per token" for budget in config.budget if config.per_token]
    model.check_length(config.block_tokens, f"Pass --block-tokens {model.positions}.")
    blocks = load_blocks(model.tokenizer, config.text, tokens=config.tokens, block_tokens=config.block_tokens)
    results = evaluate(model, [*subnets, *routings], blocks, original=shared.load_original(config), show=True)
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
    about_original = "" if config.original is None else f"   KL to {config.original}"
    title = f"{'sub-network':<28}{'share':>7}{'nats/token':>18}{'bits/byte':>11}"
    print(f"{title}   {'above ' + names[0]:<16}{about_original}".rstrip())
    for name, result in zip(names, results, strict=True):
        loss = f"{result.nats_per_token:.4f} ±{result.standard_error:.4f}"
        above = f"{result.difference:+.4f} ±{result.difference_standard_error:.4f}"
        kl = "" if result.divergence is None else f"   {result.divergence:.4f} ±{result.divergence_standard_error:.4f}"
        print(f"{name:<28}{result.share:>7.1%}{loss:>18}{result.bits_per_byte:>11.4f}   {above:<16}{kl}".rstrip())
    for name, cost in zip(names, costs, strict=True):
        if cost is not None:
            print(f"{name}: its tokens cost {cost:.3f}x of the full model on average, by the latency table")
    if config.picture is not None:
        text = model.tokenizer.decode(blocks.tokens[0])  # type: ignore[union-attr]
        shared.show_usage(model, routings[-1], text, config.budget[-1], config.picture)
