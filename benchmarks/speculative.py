"""Measure speculative decoding with nested drafts: acceptance, tokens per pass, and speed-up over greedy decoding.

python benchmarks/speculative.py out/trained

Each round runs plain decoding and every draft at every length in turn, on each prompt, with `inference.decoder`.
The columns, with times relative to one step of the full model:

  c          time of a draft's step
  v          time of a pass over n drafted tokens and the one before them
  a          chance that a drafted token is accepted, assumed constant: tokens per pass = (1 - a^(n + 1)) / (1 - a)
  expected   tokens per pass / (n c + v), from Leviathan et al. 2023, theorem 3.8, which sets v to 1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import Positional

from flextron import Draft, ElasticModel, Subnet, choose, generate, load_blocks
from flextron.elastic.checkpoint import quiet_transformers
from flextron.generation import compare_speculative
from flextron.inference.decoder import Decoder
from flextron.inference.speculative import stream_speculative
from flextron.inference.streaming import stream_tokens
from model import write_results

CONTEXT = 128  # number of tokens before a timed step
WORDS = "The most important thing about {} is"
SUBJECTS = ("a good library", "the weather", "learning to cook", "a long journey by train")


@dataclass(frozen=True)
class Settings:
    """Time speculative decoding."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a trained elastic checkpoint."""
    drafts: tuple[str, ...] = ("30%", "50%", "60%", "70%", "80%")
    """Draft sub-networks, as for `--subnet`."""
    tokens: tuple[int, ...] = (1, 2, 3, 4, 6)
    """Numbers of tokens to draft."""
    new_tokens: int = 64
    """Number of tokens to generate after each prompt; the first is not timed."""
    prompts: int = 4
    """Number of prompts: half are instructions in the chat template, half are blocks of held-out text."""
    rounds: int = 3
    """Number of interleaved rounds over the prompts; medians are printed."""
    steps: int = 20
    """Number of repetitions of a single step or pass; the median is used."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    assisted: bool = False
    """Whether to time transformers' assisted generation too, on the first prompt with the first draft."""
    out: Path | None = None
    """JSON file to write."""


def main(settings: Settings) -> None:
    """Time all drafts and print the results."""
    quiet_transformers()
    model = ElasticModel.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    full = model.search_space.full
    subnets = {name: choose(model, name, settings.model) for name in settings.drafts}
    prompts = _prompts(model, settings.prompts)
    steps = _step_times(model, {"full": full, **subnets}, settings)
    plain: list[float] = []
    ratios: dict[str, dict[int, list[float]]] = {name: {n: [] for n in settings.tokens} for name in subnets}
    counts = {name: {n: Draft(subnet, n) for n in settings.tokens} for name, subnet in subnets.items()}
    differing = 0
    for round_ in range(settings.rounds + 1):
        for prompt_BT in prompts:
            expected, seconds = _timed(stream_tokens(model, full, prompt_BT, max_new_tokens=settings.new_tokens))
            for name, drafts in counts.items():
                for n, draft in drafts.items():
                    counting = draft if round_ else Draft(draft.subnet, n)  # the first round warms up
                    stream = stream_speculative(model, full, counting, prompt_BT, max_new_tokens=settings.new_tokens)
                    found, taken = _timed(stream)
                    differing += found != expected
                    if round_:
                        ratios[name][n].append(seconds / taken)
            if round_:
                plain.append(1000 * seconds / (settings.new_tokens - 1))
    print(
        f"{settings.dtype}, {torch.get_num_threads()} threads, {len(prompts)} texts of {settings.new_tokens} tokens, "
        f"{settings.rounds} interleaved rounds; plain decoding {median(plain):.1f} ms per token"
    )
    rows = [_row(model, name, n, counts[name][n], ratios[name][n], steps) for name in subnets for n in settings.tokens]
    print(f"{'draft':<8}{'share':>6}{'ahead':>6}{'c':>6}{'v':>6}{'accepted':>10}{'a':>6}{'tokens/pass':>13}"
          f"{'speed-up':>10}{'expected':>10}")  # fmt: skip
    for row in rows:
        print(
            f"{row['draft']:<8}{row['share']:>6.0%}{row['tokens']:>6}{row['c']:>6.2f}{row['v']:>6.2f}"
            f"{row['acceptance']:>10.0%}{row['a']:>6.2f}{row['tokens_per_pass']:>13.2f}"
            f"{row['speed_up']:>10.2f}{row['expected']:>10.2f}"
        )
    runs = (settings.rounds + 1) * len(prompts) * len(rows)
    print(f"texts that differ from plain greedy decoding: {differing} of {runs}")
    results = {"rows": rows, "plain_ms": plain, "step_ms": steps, "texts": runs, "differing": differing}
    if settings.assisted:
        results["assisted"] = _assisted(model, next(iter(subnets.values())), settings)
    write_results(settings.out, results)


def _prompts(model: ElasticModel, number: int) -> list[torch.Tensor]:
    """Return prompts as token ids, [1, T] each."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    blocks = load_blocks(tokenizer, "sample/validation", tokens=64 * number, block_tokens=64)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": WORDS.format(subject)}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        for subject in SUBJECTS
    ]
    both = [prompt for row, chat in enumerate(chats) for prompt in (chat, blocks.tokens[row % number][None])]
    return both[:number]


def _timed(stream: Iterable[int]) -> tuple[list[int], float]:
    """Return the tokens, and the seconds for all after the first."""
    coming = iter(stream)
    tokens = [next(coming)]
    start = time.perf_counter()
    tokens += coming
    return tokens, time.perf_counter() - start


def _step_times(model: ElasticModel, subnets: dict[str, Subnet], settings: Settings) -> dict[str, dict[int, float]]:
    """Return the median ms of each sub-network's step and of the full model's passes, interleaved."""
    longest = max(settings.tokens) + 1
    decoders = {name: Decoder(model, subnet, max_tokens=CONTEXT + longest) for name, subnet in subnets.items()}
    lengths = {name: [1] for name in subnets}
    lengths["full"] = [1, *(n + 1 for n in settings.tokens)]
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in ns} for name, ns in lengths.items()}
    for _ in range(settings.steps + 1):
        for name, decoder in decoders.items():
            for n, found in times[name].items():
                decoder.pretend(CONTEXT)
                found.append(_ms(lambda decoder=decoder, n=n: decoder.steps([5] * n)))
    return {name: {n: median(found[1:]) for n, found in of_name.items()} for name, of_name in times.items()}


def _ms(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def _row(
    model: ElasticModel, name: str, n: int, draft: Draft, ratios: list[float], steps: dict[str, dict[int, float]]
) -> dict[str, float | str]:
    c, v = steps[name][1] / steps["full"][1], steps["full"][n + 1] / steps["full"][1]
    return {
        "draft": name,
        "share": model.share(draft.subnet),
        "tokens": n,
        "acceptance": draft.acceptance,
        "a": _chance(draft.tokens_per_pass, n),
        "c": c,
        "v": v,
        "tokens_per_pass": draft.tokens_per_pass,
        "speed_up": median(ratios),
        "expected": draft.tokens_per_pass / (n * c + v),
    }


def _chance(tokens_per_pass: float, n: int) -> float:
    """Return the acceptance chance a, found by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        a = (low + high) / 2
        low, high = (a, high) if sum(a**i for i in range(n + 1)) < tokens_per_pass else (low, a)
    return low


def _assisted(model: ElasticModel, subnet: Subnet, settings: Settings) -> dict[str, float | bool]:
    prompt = WORDS.format(SUBJECTS[0])
    options = {"chat": True, "max_new_tokens": settings.new_tokens, "fast": False}
    generate(model, prompt, **{**options, "max_new_tokens": 2})
    found = [compare_speculative(model, prompt, Draft(subnet, 4), **options) for _ in range(settings.rounds)]
    speed_up, equal = median(ratio for ratio, _ in found), all(same for _, same in found)
    print(f"transformers' assisted generation with 4 drafted tokens: {speed_up:.2f} times as fast, same text: {equal}")
    return {"speed_up": speed_up, "equal": equal}


if __name__ == "__main__":
    main(tyro.cli(Settings))
