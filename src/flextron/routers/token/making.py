"""Making a token router for a checkpoint from what its folder holds; saving and loading it there."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flextron.atomic import keeping, new_folder, reserved
from flextron.costs.saved import find_table
from flextron.costs.timing import PHASES, check_phase
from flextron.elastic.model import ElasticModel
from flextron.environment import faster_dtype
from flextron.errors import RouterError
from flextron.ranking.sensitivity import sensitivity_blocks
from flextron.records import read_record
from flextron.routers.about import checked_about, routed_phase
from flextron.routers.state import load_state
from flextron.routers.static.making import sensitivity_of, unused_blocks
from flextron.routers.static.net import StaticRouter
from flextron.routers.static.pairs import FOLDER
from flextron.routers.static.router import Router
from flextron.routers.token.learning import ROUNDS, TokenRouterAbout, train_token_router
from flextron.routers.token.net import TokenRouter
from flextron.routers.token.slopes import KeptSlopes

VERSION = 1
WEIGHTS = "token_router.safetensors"
ABOUT = "token_router.json"
TOKENS_PER_ROUND = 2048
"""Least number of tokens in a round: 8 blocks, one of them held out."""
CALIBRATION_TOKENS = 4096


def make_token_router(
    model: ElasticModel,
    folder: str | Path,
    *,
    tokens: int = 12288,
    text: str = "sample/train",
    rounds: int = ROUNDS,
    calibrated: Sequence[float] | None = None,
    phase: str = "decode",
    seed: int = 0,
    any_device: bool = False,
    show: bool = False,
) -> tuple[TokenRouter, TokenRouterAbout]:
    """Train a token router on top of the static router for one phase and save it in `folder`.

    Measured rounds of slopes stay in `folder`/routers until the router is saved: an interrupted run resumes from them.

    Args:
        folder: the elastic checkpoint that `model` was loaded from.
        tokens: number of tokens of `text` to learn from, without documents that the model was ranked on. The documents
            that follow serve for calibration.
        rounds, calibrated: as for `train_token_router`.
        phase: prefill or decode.
        any_device: accept a latency table of another device or version.
        show: print progress bars to standard error.

    Raises:
        ValueError: an unknown phase, or too few tokens.
        RouterError: no static router for this phase, too little text, or as `train_token_router`.
        CostError: no latency table for this device and version, and `any_device` is false.
    """
    check_phase(phase)
    least = rounds * TOKENS_PER_ROUND
    if tokens < least:
        raise ValueError(f"tokens is {tokens}; a token router needs at least {least}.")
    static = Router.load(folder, PHASES[phase], model)
    table = find_table(model, folder, PHASES[phase], foreign=any_device, warn=lambda text: print(text, file=sys.stderr))
    blocks, _ = unused_blocks(model, sensitivity_of(model, folder), text, tokens=tokens)
    if blocks.tokens.numel() < least:
        raise RouterError(
            f"{text} has {blocks.tokens.numel()} tokens that the model was not ranked on; a token router needs at "
            f"least {least}. Give a longer text."
        )
    calibration = sensitivity_blocks(
        model.tokenizer, text, tokens=CALIBRATION_TOKENS, after=blocks.documents, block_tokens=model.fitting(256)
    )
    settings = {"text": blocks.text, "tokens": blocks.tokens.numel(), "rounds": rounds, "seed": seed}
    kept = KeptSlopes(folder, {**settings, "weights": model.fingerprint(), "router": _digest(static.net)})
    options: dict[str, Any] = {"rounds": rounds, "calibrated": calibrated, "seed": seed, "show": show}
    with reserved(Path(folder) / FOLDER, grows=True):
        router, about = train_token_router(
            model, static, table, blocks, calibration, arithmetic=faster_dtype(model.device), kept=kept, **options
        )
        with keeping("The measured slopes are kept: run the same command again."):
            save_token_router(folder, router, about, model)
        kept.forget()
    return router, about


def _digest(net: torch.nn.Module) -> str:
    """Return a hash of a network's weights."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def remake_token_router(
    folder: str | Path, old: TokenRouterAbout, *, device: str, show: bool = False
) -> tuple[TokenRouter, TokenRouterAbout]:
    """Train a token router for the weights, table and static router in `folder`, on the text of an older one.

    Raises:
        FlextronError: as `make_token_router`.
    """
    phase = routed_phase(old.metric)
    model = ElasticModel.from_pretrained(folder, device=device)
    return make_token_router(model, folder, phase=phase, tokens=old.tokens, text=old.text, any_device=True, show=show)


def save_token_router(folder: str | Path, router: TokenRouter, about: TokenRouterAbout, model: ElasticModel) -> Path:
    """Write or replace routers/METRIC-per-token in a checkpoint's folder, whole or not at all; returns the path."""
    target = Path(folder) / FOLDER / f"{about.metric}-per-token"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in router.state_dict().items()}
    data = {"version": VERSION, "fingerprint": model.fingerprint(), **asdict(about)}
    with new_folder(target, overwrite=True, kind=ABOUT) as partial:
        save_file(tensors, partial / WEIGHTS)
        (partial / ABOUT).write_text(json.dumps(data, indent=1) + "\n", encoding="utf8")
    return target


def has_token_router(folder: str | Path, metric: str) -> bool:
    """Return whether the checkpoint in `folder` has a token router for `metric`."""
    return (Path(folder) / FOLDER / f"{metric}-per-token" / ABOUT).is_file()


def load_token_router(folder: str | Path, metric: str, model: ElasticModel) -> tuple[TokenRouter, TokenRouterAbout]:
    """Read the token router for `metric` from a checkpoint's folder.

    Raises:
        RouterError: missing, damaged, of another version, for a metric of no phase, or trained for other weights than
            the model's.
    """
    source = Path(folder) / FOLDER / f"{metric}-per-token"
    way_out = f"Train one: flextron train-router {folder} --phase {routed_phase(metric)} --per-token"
    if not has_token_router(folder, metric):
        raise RouterError(f"{folder} has no token router for {metric}. {way_out}")
    try:
        data = read_record(source / ABOUT, version=VERSION)
        if data.pop("fingerprint", None) != model.fingerprint():
            raise RouterError(f"the token router in {source} was trained for another checkpoint. {way_out}")
        router = _of_state(load_file(source / WEIGHTS), model)
        return router, checked_about(data, TokenRouterAbout, metric)
    except (OSError, ValueError, SafetensorError) as error:
        raise RouterError(f"cannot read the token router in {source}: {str(error).rstrip('.')}. {way_out}") from None


def _of_state(state: dict[str, torch.Tensor], model: ElasticModel) -> TokenRouter:
    """Return the token router for a model that had this `state_dict()`.

    Raises:
        ValueError: it was none's.
    """
    static = {name.removeprefix("static."): tensor for name, tensor in state.items() if name.startswith("static.")}
    rank, budgets = (state.get(name, torch.empty(0)).shape[-1:].numel() for name in ("out_LR", "budgets_C"))
    router = TokenRouter(StaticRouter.from_state(static, model.search_space), model.config.hidden_size, rank=rank)
    for name in ("budgets_C", "offsets_C", "plan_CL"):
        buffer: torch.Tensor = getattr(router, name)
        setattr(router, name, buffer.new_empty(budgets, *buffer.shape[1:]))
    load_state(router, state)
    if budgets < 2 or not bool((router.budgets_C.diff() > 0).all()) or bool((router.plan_CL < 0).any()):
        raise ValueError("its calibrated budgets do not ascend, or their costs are negative")
    return router


def describe_token_router(router: TokenRouter, about: TokenRouterAbout) -> str:
    """Describe in a few lines how a token router was made, and whether it tells tokens apart."""
    lines = [
        f"token router for {about.metric}, from {about.tokens} tokens of {about.text}",
        f"quasi-likelihood gained on held-out rows: {about.explained:.3f}",
        f"calibrated from {float(router.budgets_C[0]):.2f}x to {float(router.budgets_C[-1]):.2f}x",
    ]
    if about.explained <= 0:
        lines.append("It does not tell tokens apart: it answers like the static router. Give it more tokens.")
    return "\n".join(lines)
