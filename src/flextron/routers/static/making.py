"""Making a static router for a checkpoint from what its folder holds: latency table, sensitivities, measured pairs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flextron.atomic import keeping, reserved
from flextron.costs.latency import measure_latency
from flextron.costs.pricing import Ceiling, doubts
from flextron.costs.saved import FOLDER as LATENCY_FOLDER
from flextron.costs.saved import describe, find_table, is_of, save_table
from flextron.costs.table import CostTable
from flextron.costs.timing import PHASES, check_phase
from flextron.data.blocks import TokenBlocks, load_blocks
from flextron.elastic.model import ElasticModel
from flextron.environment import faster_dtype
from flextron.errors import RouterError
from flextron.progress import bar
from flextron.ranking.sensitivity import Sensitivity, sensitivity_blocks
from flextron.routers.about import routed_phase
from flextron.routers.static.learning import (
    CHECKED_BUDGETS,
    LEAST_EVALUATIONS,
    check_answers,
    fit_router,
    train_router,
)
from flextron.routers.static.net import StaticRouter
from flextron.routers.static.pairs import FOLDER, LossMeter, Pairs
from flextron.routers.static.router import Router
from flextron.subnet import Subnet

Say = Callable[[str], None]
MOST_EVALUATIONS = 256
TOKENS = 512
"""Length of the prompt or context for measuring a latency table, if the model has that many positions."""


def make_router(
    model: ElasticModel,
    folder: str | Path,
    *,
    phase: str = "decode",
    evaluations: int = MOST_EVALUATIONS,
    tokens: int = 1024,
    text: str = "sample/train",
    lowest: float = 0.45,
    start: Router | None = None,
    seed: int = 0,
    any_device: bool = False,
    show: bool = False,
) -> Router:
    """Train a router for the latency of one phase and save it in `folder`, where `flextron.route` finds it.

    If the folder has no latency table for this phase, one is measured and saved first. Measured losses stay in
    `folder`/routers: an interrupted run resumes from them, and runs for the other phase use them too.

    Args:
        folder: the elastic checkpoint that `model` was loaded from.
        phase: prefill or decode.
        evaluations: number of sub-networks to measure at most.
        tokens: number of tokens of `text` to measure each sub-network on, without documents that the model was ranked
            on.
        lowest: lowest budget to train for, as a share of the full model's cost.
        start: router to continue from, instead of the greedy choice.
        any_device: accept a latency table of another device or version.
        show: print progress and bars to standard error.

    Raises:
        ValueError: an unknown phase, or as `train_router`.
        RouterError: no sensitivities, measured pairs of another checkpoint or text, or as `train_router`.
        CheckpointError: another process makes a router in `folder`, or a write fails; measured losses are kept.
        CostError: all latency tables are for another device or version, and `any_device` is false.
    """
    check_phase(phase)
    say: Say = partial(print, file=sys.stderr) if show else lambda _: None
    sensitivity = sensitivity_of(model, folder)
    blocks, after = unused_blocks(model, sensitivity, text, tokens=tokens)
    about = {
        "fingerprint": model.fingerprint(),
        "text": blocks.text,
        "tokens": blocks.predicted_tokens,
        "documents_left_out": after,
    }
    with reserved(Path(folder) / FOLDER, grows=True):
        pairs = Pairs.beside(folder, about, model.search_space)
        if len(pairs):
            say(f"resuming with {len(pairs)} measured sub-networks from {pairs.file}")
        table = _table(model, folder, phase, any_device=any_device, show=show, say=say)
        meter = LossMeter(model, blocks, arithmetic=faster_dtype(model.device))
        options: dict[str, Any] = {
            "evaluations": evaluations,
            "lowest": lowest,
            "start": start,
            "seed": seed,
            "show": show,
        }
        router = train_router(sensitivity, table, meter, pairs, **options)
        with keeping("The measured losses are kept: run the same command again."):
            router.save(folder, model)
        return router


def router_from_pairs(
    model: ElasticModel,
    folder: str | Path,
    *,
    phase: str = "decode",
    lowest: float = 0.45,
    seed: int = 0,
    any_device: bool = False,
    show: bool = False,
) -> Router:
    """Train a router on the pairs that `folder` holds, as a pack's does, and save it there; nothing new is measured.

    If the folder has no latency table for this phase, one is measured and saved first.

    Raises:
        RouterError: there are no pairs of these weights, or as `fit_router`.
        FlextronError: as `make_router`.
    """
    check_phase(phase)
    say: Say = partial(print, file=sys.stderr) if show else lambda _: None
    sensitivity, pairs = sensitivity_of(model, folder), Pairs.most_of(folder, model.fingerprint(), model.search_space)
    if pairs is None:
        raise RouterError(f"{folder} has no measured pairs of these weights. Measure some: --evaluations 256.")
    with reserved(Path(folder) / FOLDER, grows=True):
        table = _table(model, folder, phase, any_device=any_device, show=show, say=say)
        about = {"text": pairs.about.get("text", ""), "tokens": pairs.about.get("tokens", 0)}
        router = fit_router(sensitivity, table, pairs, lowest=lowest, seed=seed, **about)
        router.save(folder, model)
        return router


def sensitivity_of(model: ElasticModel, folder: str | Path) -> Sensitivity:
    """Load the sensitivities beside a checkpoint.

    Raises:
        RouterError: no sensitivities, or for another search space.
    """
    way_out = "Measure them: flextron rank MODEL OUT"
    if not Sensitivity.is_in(folder):
        raise RouterError(f"{folder} has no sensitivities; a router starts from them. {way_out}")
    sensitivity = Sensitivity.load(folder)
    if sensitivity.search_space != model.search_space:
        raise RouterError(f"the sensitivities in {folder} are for another search space than the model's. {way_out}")
    return sensitivity


def unused_blocks(model: ElasticModel, sensitivity: Sensitivity, text: str, *, tokens: int) -> tuple[TokenBlocks, int]:
    """Return blocks of text that ranking and sensitivities did not use, and the number of documents skipped."""
    after = _documents_used(model, sensitivity, text)
    return sensitivity_blocks(model.tokenizer, text, tokens=tokens, after=after, block_tokens=model.fitting(256)), after


def _documents_used(model: ElasticModel, sensitivity: Sensitivity, text: str) -> int:
    """Return how many documents at the start of `text` were used for ranking or sensitivities."""
    ranking, used = model.ranking, 0
    if ranking is not None and ranking.text == text and ranking.tokens:
        used = load_blocks(
            model.tokenizer, text, tokens=ranking.tokens, block_tokens=min(512, ranking.tokens)
        ).documents
    if sensitivity.text == text:
        tokens = -(-sensitivity.tokens // 255) * 256  # in blocks of 256 or fewer, whose first token is not predicted
        used = max(used, sensitivity_blocks(model.tokenizer, text, tokens=tokens, after=used).documents)
    return used


def _table(model: ElasticModel, folder: str | Path, phase: str, *, any_device: bool, show: bool, say: Say) -> CostTable:
    """Return the latency table of a phase; if there is none, measure and save one."""
    tables = (CostTable.load(file) for file in (Path(folder) / LATENCY_FOLDER).glob("*.json"))
    if not any(table.metric == PHASES[phase] and is_of(table, None) for table in tables):
        say(f"{folder} has no latency table for {phase}; measuring one first")
        positions = getattr(model.config, "max_position_embeddings", None) or TOKENS + 1
        with reserved(Path(folder) / LATENCY_FOLDER, grows=True):
            table = measure_latency(model, phase=phase, tokens=min(TOKENS, positions - 1), show=show)
            say(f"{describe(table)}\nwrote {save_table(folder, table)}")
    else:
        table = find_table(model, folder, PHASES[phase], foreign=any_device, warn=say)
    for doubt in doubts([Ceiling(table, table.full, phase)]):
        say(f"note: {doubt}")
    return table


def keep_router(folder: str | Path, old: Router, before: str | Path, *, device: str, show: bool = False) -> Router:
    """Copy a router to the checkpoint in `folder`, whose weights were trained from those in `before` at its answers.

    Its answers stay the same; their losses are measured again. The latency tables of `before` are copied too.

    Raises:
        FlextronError: no sensitivities, no latency table, or the text is missing.
    """
    _copy_tables(before, folder)
    model = ElasticModel.from_pretrained(folder, device=device)
    sensitivity = sensitivity_of(model, folder)
    table = find_table(model, folder, old.about.metric, foreign=True)
    blocks, _ = unused_blocks(model, sensitivity, old.about.text, tokens=_tokens_of(old))
    greedy = StaticRouter.of(sensitivity, table, lowest=old.net.lowest)
    with bar(2 * CHECKED_BUDGETS, description="router's answers", show=show) as advance:
        meter = LossMeter(model, blocks, arithmetic=faster_dtype(model.device))

        def measure(subnets: list[Subnet]) -> list[float]:
            losses = []
            for subnet in subnets:
                losses.append(meter(subnet))
                advance()
            return losses

        checks = check_answers(old.net, greedy, table, measure)
    router = replace(old, about=replace(old.about, checks=checks, kept=True))
    router.save(folder, model)
    return router


def remake_router(folder: str | Path, old: Router, before: str | Path, *, device: str, show: bool = False) -> Router:
    """Train a router further for the weights in `folder`, which were trained from those in `before`.

    The latency tables of `before` are copied. As many sub-networks are measured as the first time.

    Raises:
        FlextronError: as `make_router`.
    """
    _copy_tables(before, folder)
    return make_router(
        ElasticModel.from_pretrained(folder, device=device),
        folder,
        phase=routed_phase(old.about.metric),
        evaluations=max(LEAST_EVALUATIONS, min(old.about.pairs, MOST_EVALUATIONS)),
        tokens=_tokens_of(old),
        text=old.about.text,
        lowest=old.net.lowest,
        start=old,
        any_device=True,
        show=show,
    )


def _copy_tables(before: str | Path, folder: str | Path) -> None:
    tables = Path(before) / LATENCY_FOLDER
    if tables.is_dir():
        shutil.copytree(tables, Path(folder) / LATENCY_FOLDER, dirs_exist_ok=True)


def _tokens_of(router: Router) -> int:
    """Return the number of tokens it was measured on, including the first of each block, which is not predicted."""
    return -(-router.about.tokens // 255) * 256


_CHECKED = (
    "",
    "loss of its answers and of the greedy choice (half to the text, half to the full model's predictions):",
    f"{'budget':<8}{'router':>12}{'greedy':>12}",
)


def describe_router(router: Router) -> str:
    """Describe a router in a few lines: errors of its surrogate, and losses of its answers and the greedy choice's."""
    about = router.about
    before = " for the weights before training" if about.kept else ""
    lines = [
        f"router for {about.metric}, from {about.pairs} sub-networks measured on {about.tokens} tokens of {about.text}",
        f"surrogate{before}, on the last sub-networks measured: {about.error}",
        f"surrogate{before}, cross-validated: {about.cross_validated}",
        *(_CHECKED if about.checks else ()),
        *(f"{f'{check.budget:.2f}x':<8}{check.loss:>12.4f}{check.greedy_loss:>12.4f}" for check in about.checks),
    ]
    return "\n".join(lines)
