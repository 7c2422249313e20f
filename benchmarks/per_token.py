"""Compare per-token routing with the static router: loss at equal mean cost, and time at equal mean widths.

python benchmarks/per_token.py MODEL --phase quality --texts validation.jsonl.xz wikitext.jsonl.xz
python benchmarks/per_token.py MODEL --phase speed --dtype float32

MODEL is an elastic checkpoint with a static and a token router (`flextron train-router MODEL --phase prefill
--per-token`).

- quality: losses of both routers, paired. The static router gets the mean cost of the routed tokens as its budget. A
  control gives the same widths to other tokens of the batch.
- speed: times in turn the routed model with its routers, a static sub-network of the same mean widths, the masked
  definition and the full model. It also times a batch in which half of the requests have the whole budget, and both
  pure batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import tyro

from flextron import ElasticModel, Subnet, TokenRouting, evaluate, load_blocks
from flextron.costs.saved import find_table
from flextron.environment import describe_device
from flextron.progress import progress
from flextron.routers.static.router import Router
from flextron.routers.token.learning import static_answers
from flextron.routers.token.making import load_token_router
from model import write_results


@dataclass(frozen=True)
class Settings:
    """Compare per-token routing with the static router."""

    model: Annotated[str, tyro.conf.Positional]
    """Elastic checkpoint with both routers."""
    phase: Literal["quality", "speed"] = "quality"
    """Which comparison to run."""
    metric: Literal["ttft", "tpot"] = "ttft"
    """Metric of the routers."""
    budgets: tuple[float, ...] = (0.8, 0.7, 0.6, 0.5)
    """Budgets, as fractions of the full model's cost."""
    texts: tuple[str, ...] = ("sample/validation",)
    """Texts to measure losses on."""
    tokens: int = 8192
    """Number of tokens of each text."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights."""
    device: str = "auto"
    """Device to run on; auto uses a GPU if there is one."""
    prompt_tokens: int = 2048
    """Number of tokens in the timed prefill."""
    rows: int = 16
    """Number of requests in the timed decoding."""
    context_tokens: int = 128
    """Number of context tokens of each request."""
    rounds: int = 7
    """Number of interleaved timing rounds; medians are printed."""
    any_device: bool = False
    """Whether to use a latency table of another device or version."""
    out: Path | None = None
    """JSON file to write."""


Use = Callable[[], AbstractContextManager[Any]]
"""Returns a context in which the model runs in one way."""


class Bench:
    """A model with both routers and their cost table."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = ElasticModel.from_pretrained(settings.model, dtype=settings.dtype, device=settings.device)
        self.static = Router.load(settings.model, settings.metric, self.model)
        self.router, self.about = load_token_router(settings.model, settings.metric, self.model)
        self.table = find_table(self.model, settings.model, settings.metric, foreign=settings.any_device, warn=print)

    def subnet(self, budget: float) -> Subnet:
        """Return the static router's answer to a budget."""
        return static_answers(self.static, self.table, [budget])[0]

    def routing(self, *budgets: float, **options: bool) -> TokenRouting:
        """Return the token routing for budgets."""
        return TokenRouting(
            self.model, self.router, budgets, static_answers(self.static, self.table, budgets), **options
        )

    def conditions(self) -> dict[str, Any]:
        """Return the conditions of the measurements."""
        settings = asdict(self.settings) | {"out": None}
        return {"device": describe_device(self.model.device), "torch": torch.__version__, "settings": settings}


def quality(bench: Bench) -> list[dict[str, Any]]:
    """Measure and print the losses for each text and budget."""
    rows = []
    print(f"{'text':<22}{'budget':>7}{'cost':>7}{'static':>9}{'per token':>11}{'difference':>20}{'shuffled':>20}")
    for text in bench.settings.texts:
        blocks = load_blocks(bench.model.tokenizer, text, tokens=bench.settings.tokens)
        for budget in bench.settings.budgets:
            routing, shuffled = bench.routing(budget), bench.routing(budget, shuffled=True)
            evaluate(bench.model, [routing], blocks)  # measures the mean cost on this text
            cost = routing.average_cost
            static, routed, control = evaluate(bench.model, [bench.subnet(cost), routing, shuffled], blocks)
            row = {
                "text": Path(text).name,
                "budget": budget,
                "cost": cost,
                "static": static.nats_per_token,
                "per_token": routed.nats_per_token,
                "difference": [routed.difference, routed.difference_standard_error],
                "shuffled": [control.difference, control.difference_standard_error],
                "shuffled_cost": shuffled.average_cost,
                "tokens": static.tokens,
            }
            rows.append(row)
            print(
                f"{row['text'][:21]:<22}{budget:>6}x{cost:>7.3f}{row['static']:>9.4f}{row['per_token']:>11.4f}"
                f"{routed.difference:>+11.4f} ± {routed.difference_standard_error:.4f}"
                f"{control.difference:>+11.4f} ± {control.difference_standard_error:.4f}",
                flush=True,
            )
    return rows


def speed(bench: Bench) -> list[dict[str, Any]]:
    """Measure and print the times for each budget, relative to a static sub-network."""
    settings, model = bench.settings, bench.model
    words = load_blocks(model.tokenizer, settings.texts[0], tokens=settings.prompt_tokens, block_tokens=128).tokens
    prompt_BT = words.view(1, -1)[:, : settings.prompt_tokens].to(model.device)
    context_BT = words.view(-1)[: settings.context_tokens].expand(settings.rows, -1).contiguous()
    for row in range(settings.rows):  # gives each row another text
        context_BT[row] = context_BT[row].roll(7 * row)
    rows = []
    for kind, tokens_BT in (("prefill", prompt_BT), ("decode", context_BT.to(model.device))):
        make = partial(_prefill, model, tokens_BT) if kind == "prefill" else partial(_decode, model, tokens_BT)
        for budget in settings.budgets:
            routing = bench.routing(budget)
            _run_once(make, routing.use)
            average = _subnet_of_mean_widths(bench, routing)
            uses: dict[str, Use] = {
                "static": partial(model.use, average),
                "per token": routing.use,
                "masked": bench.routing(budget, masked=True).use,
                "full": partial(model.use, model.search_space.full),
            }
            ways = {name: (make, use) for name, use in uses.items()}
            times = _interleaved(ways, settings.rounds, f"{kind} {budget}x")
            ratios = {
                name: median(a / b for a, b in zip(each, times["static"], strict=True)) for name, each in times.items()
            }
            rows.append(
                {"kind": kind, "budget": budget, "ms": {n: median(t) for n, t in times.items()}, "ratios": ratios}
            )
            said = ", ".join(f"{name} {median(times[name]):.1f} ms ({ratio:.2f})" for name, ratio in ratios.items())
            print(f"{kind:<8}{tuple(tokens_BT.shape)!s:<12}{budget}x: {said}", flush=True)
        rows.append(_mixed(bench, kind, tokens_BT))
    return rows


def _mixed(bench: Bench, kind: str, tokens_BT: torch.Tensor) -> dict[str, Any]:
    """Time a batch with half of its rows at the whole budget and half at 0.5x, and both pure batches.

    The rows of 1.0x alone give the shortest time of a mixed batch, because they read all weights.
    """
    rows = bench.settings.rows
    if kind == "prefill":
        tokens_BT = tokens_BT.view(rows, -1)
    make = partial(_prefill if kind == "prefill" else _decode, bench.model)
    budgets = [1.0] * (rows // 2) + [0.5] * (rows // 2)
    ways = {
        "mixed": (partial(make, tokens_BT), bench.routing(*budgets).use),
        "1.0x": (partial(make, tokens_BT), bench.routing(1.0).use),
        "0.5x": (partial(make, tokens_BT), bench.routing(0.5).use),
        "half of 1.0x": (partial(make, tokens_BT[: rows // 2]), bench.routing(1.0).use),
    }
    times = _interleaved(ways, bench.settings.rounds, f"{kind} mixed")
    means = [(full + half) / 2 for full, half in zip(times["1.0x"], times["0.5x"], strict=True)]
    ratio, floor = (
        median(ms / mean for ms, mean in zip(times[name], means, strict=True)) for name in ("mixed", "half of 1.0x")
    )
    said = ", ".join(f"{name} {median(each):.1f} ms" for name, each in times.items())
    ratios = f"relative to the mean of both: mixed {ratio:.2f}, its {rows // 2} rows of 1.0x alone {floor:.2f}"
    print(f"{kind:<8}{tuple(tokens_BT.shape)!s:<12}mixed budgets: {said}; {ratios}", flush=True)
    return {"kind": f"{kind} mixed", "ms": {n: median(t) for n, t in times.items()}, "ratio": ratio, "alone": floor}


def _subnet_of_mean_widths(bench: Bench, routing: TokenRouting) -> Subnet:
    """Return the static sub-network whose widths are nearest to the tokens' mean widths, per layer and in total."""
    choices, left, neurons = bench.model.search_space.neurons, 0.0, []
    for average in routing.average_neurons:
        neurons.append(min(choices, key=lambda width, wanted=average + left: abs(width - wanted)))
        left += average - neurons[-1]
    return Subnet(tuple(neurons), routing.subnets[0].kv_groups)


def _interleaved(
    ways: dict[str, tuple[Callable[[], Callable[[], None]], Use]],
    rounds: int,
    name: str,
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in progress(range(rounds + 1), name):
        for way, (make, use) in ways.items():
            ms = _run_once(make, use)
            if round_:  # the first round warms up
                times[way].append(ms)
    return times


@torch.inference_mode()
def _run_once(make: Callable[[], Callable[[], None]], use: Use) -> float:
    with use():
        run = make()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)


def _prefill(model: ElasticModel, tokens_BT: torch.Tensor) -> Callable[[], None]:
    return lambda: model(tokens_BT, use_cache=False, logits_to_keep=1)


def _decode(model: ElasticModel, tokens_BT: torch.Tensor) -> Callable[[], None]:
    """Read the context, and return a function that runs four steps after it."""
    cache = model(tokens_BT, use_cache=True, logits_to_keep=1).past_key_values

    def run() -> None:
        for step in range(4):
            model(tokens_BT[:, step : step + 1], past_key_values=cache, use_cache=True)

    return run


def main(settings: Settings) -> None:
    """Run the chosen comparison and print the results."""
    bench = Bench(settings)
    print(f"{describe_device(bench.model.device)}, {settings.dtype}; {settings.phase}")
    rows = {"quality": quality, "speed": speed}[settings.phase](bench)
    write_results(settings.out, {"conditions": bench.conditions(), "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Settings))
