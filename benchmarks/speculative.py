"""Speculative decoding with nested drafts: acceptance, tokens a pass, and speed-up over plain greedy decoding.

python benchmarks/speculative.py out/trained

Each round runs, on each prompt, plain decoding and every draft at every length, in turn, by `inference.decoder` alone.
c is a draft's step and v a pass over n drafted tokens and the one before them, in steps of the full model; a is the
chance that a drafted token is accepted, if it were the same everywhere: tokens a pass = (1 - a^(n + 1)) / (1 - a).
Expected is tokens a pass / (n c + v): Leviathan et al. 2023, theorem 3.8, who take v for 1.
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

CONTEXT = 128  # tokens before a timed step
WORDS = "The most important thing about {} is"
SUBJECTS = ("a good library", "the weather", "learning to cook", "a long journey by train")


@dataclass(frozen=True)
class Settings:
    """Time speculative decoding."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a trained elastic checkpoint."""
    drafts: tuple[str, ...] = ("30%", "50%", "60%", "70%", "80%")
    """Sub-networks that write ahead, as `--subnet` names them."""
    tokens: tuple[int, ...] = (1, 2, 3, 4, 6)
    """Tokens to write ahead."""
    new_tokens: int = 64
    """Tokens to generate after each prompt; the first is not timed."""
    prompts: int = 4
    """Half of them instructions in the chat template, half blocks of held-out text."""
    rounds: int = 3
    """Interleaved rounds over the prompts; medians are printed."""
    steps: int = 20
    """Repetitions of a single step or pass, of which the median is taken."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    assisted: bool = False
    """Also time transformers' assisted generation, on the first prompt with the first draft."""
    out: Path | None = None
    """JSON file to write."""


def main(settings: Settings) -> None:
    """Run and print."""
    quiet_transformers()
    model = ElasticModel.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    full = model.search_space.full
    subnets = {wish: choose(model, wish, settings.model) for wish in settings.drafts}
    prompts = _prompts(model, settings.prompts)
    steps = _step_times(model, {"full": full, **subnets}, settings)
    plain: list[float] = []
    ratios: dict[str, dict[int, list[float]]] = {wish: {n: [] for n in settings.tokens} for wish in subnets}
    counts = {wish: {n: Draft(subnet, n) for n in settings.tokens} for wish, subnet in subnets.items()}
    differing = 0
    for round_ in range(settings.rounds + 1):
        for prompt_BT in prompts:
            expected, seconds = _timed(stream_tokens(model, full, prompt_BT, max_new_tokens=settings.new_tokens))
            for wish, drafts in counts.items():
                for n, draft in drafts.items():
                    counting = draft if round_ else Draft(draft.subnet, n)  # the first round warms up
                    stream = stream_speculative(model, full, counting, prompt_BT, max_new_tokens=settings.new_tokens)
                    found, taken = _timed(stream)
                    differing += found != expected
                    if round_:
                        ratios[wish][n].append(seconds / taken)
            if round_:
                plain.append(1000 * seconds / (settings.new_tokens - 1))
    print(
        f"{settings.dtype}, {torch.get_num_threads()} threads, {len(prompts)} texts of {settings.new_tokens} tokens, "
        f"{settings.rounds} interleaved rounds; plain decoding {median(plain):.1f} ms a token"
    )
    rows = [_row(model, wish, n, counts[wish][n], ratios[wish][n], steps) for wish in subnets for n in settings.tokens]
    print(f"{'draft':<8}{'share':>6}{'ahead':>6}{'c':>6}{'v':>6}{'accepted':>10}{'a':>6}{'tokens/pass':>13}"
          f"{'speed-up':>10}{'expected':>10}")  # fmt: skip
    for row in rows:
        print(
            f"{row['draft']:<8}{row['share']:>6.0%}{row['tokens']:>6}{row['c']:>6.2f}{row['v']:>6.2f}"
            f"{row['acceptance']:>10.0%}{row['a']:>6.2f}{row['tokens_per_pass']:>13.2f}"
            f"{row['speed_up']:>10.2f}{row['expected']:>10.2f}"
        )
    runs = (settings.rounds + 1) * len(prompts) * len(rows)
    print(f"texts that differ from plain greedy decoding's: {differing} of {runs}")
    results = {"rows": rows, "plain_ms": plain, "step_ms": steps, "texts": runs, "differing": differing}
    if settings.assisted:
        results["assisted"] = _assisted(model, next(iter(subnets.values())), settings)
    write_results(settings.out, results)


def _prompts(model: ElasticModel, number: int) -> list[torch.Tensor]:
    """Token ids [1, T] each."""
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
    """Tokens, and seconds for all after the first."""
    coming = iter(stream)
    tokens = [next(coming)]
    start = time.perf_counter()
    tokens += coming
    return tokens, time.perf_counter() - start


def _step_times(model: ElasticModel, subnets: dict[str, Subnet], settings: Settings) -> dict[str, dict[int, float]]:
    """Median ms of one step of each sub-network, and of the full model's passes over several tokens, interleaved."""
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
    model: ElasticModel, wish: str, n: int, draft: Draft, ratios: list[float], steps: dict[str, dict[int, float]]
) -> dict[str, float | str]:
    c, v = steps[wish][1] / steps["full"][1], steps["full"][n + 1] / steps["full"][1]
    return {
        "draft": wish,
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
    """a, by halving."""
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
    print(f"transformers' assisted generation, 4 ahead: {speed_up:.2f} times its plain generate, same text: {equal}")
    return {"speed_up": speed_up, "equal": equal}


if __name__ == "__main__":
    main(tyro.cli(Settings))
