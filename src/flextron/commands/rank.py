"""`flextron rank`."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from flextron.commands import shared
from flextron.config import RankConfig

if TYPE_CHECKING:
    from flextron.data.blocks import TokenBlocks
    from flextron.model import ElasticModel

# What may change between an interrupted `rank` and the run that takes it up.
_NOT_OF_THE_RANKING = ("out", "overwrite", "sensitivity_tokens", "sensitivities", "device", "stream")


def run(config: RankConfig) -> None:
    """Rank a checkpoint, measure its sensitivities, and write it as an elastic one."""
    from flextron.atomic import check_apart, reserved

    check_apart(config.out, config.model, config.text)
    with reserved(config.out), ExitStack() as held:
        model = _ranked(config, held)
        if config.sensitivity_tokens:
            _measure_sensitivity(model, config)
    refitted = " and refitted" if config.refit_tokens and any(layer.mlp.opens for layer in model.layers) else ""
    print(f"wrote {config.out}: {model.search_space.full}, ranked by {config.score}{refitted} on {config.text}.")


def _measure_sensitivity(model: ElasticModel, config: RankConfig) -> None:
    from flextron.atomic import keeping
    from flextron.ranking.curvature import estimate_sensitivity
    from flextron.ranking.sensitivity import measure_sensitivity, sensitivity_blocks

    blocks = sensitivity_blocks(
        model.tokenizer,
        config.text,
        tokens=config.sensitivity_tokens,
        after=_blocks(model, config).documents,
        block_tokens=model.fitting(256),
    )
    learn = estimate_sensitivity if config.sensitivities == "estimated" else measure_sensitivity
    sensitivity = learn(model, blocks, show=True)
    with keeping("The ranked model is kept: the same command, without --overwrite, measures only the sensitivities."):
        sensitivity.save(config.out)


def _blocks(model: ElasticModel, config: RankConfig, *, tokens: int | None = None, after: int = 0) -> TokenBlocks:
    """What the model is ranked on; or other `tokens` that begin after so many documents, if the text has as many."""
    from flextron.data.blocks import blocks_after

    tokens = tokens or config.tokens
    block_tokens = model.fitting(min(512, tokens))
    return blocks_after(model.tokenizer, config.text, after, tokens=tokens, block_tokens=block_tokens)


def _ranked(config: RankConfig, held: ExitStack) -> ElasticModel:
    """The ranked model, saved; usable while `held` is open. An interrupted run's is taken up."""
    from flextron.atomic import check_new, check_space, tell_dropped
    from flextron.elastic.on_disk import weights_on_disk
    from flextron.ranking.importance import rank
    from flextron.ranking.refit import refit
    from flextron.ranking.sensitivity import Sensitivity
    from flextron.subnet import SearchSpace

    asks = {key: value for key, value in asdict(config).items() if key not in _NOT_OF_THE_RANKING}
    wanted = json.dumps({"version": 1, **asks}) + "\n"
    asked = config.out / "rank.json"
    unfinished = asked.is_file() and not Sensitivity.is_in(config.out)
    if unfinished and asked.read_text(encoding="utf8") == wanted and not config.overwrite:
        print(f"{config.out} is ranked already; only its sensitivities are measured.", file=sys.stderr)
        return shared.load(replace(config, model=str(config.out)))
    check_new(config.out, overwrite=config.overwrite)
    tell_dropped(config.out, "--overwrite")
    model = shared.load(config)
    check_space(config.out, (1 + config.stream) * sum(weight.nbytes for weight in model.lm.parameters()))
    if config.stream:
        held.enter_context(weights_on_disk(model, config.out))
    if config.neuron_step is not None:
        model.search_space = SearchSpace.of_model(**model.search_space.sizes, neuron_step=config.neuron_step)
    ranked_on = _blocks(model, config)
    rank(model, ranked_on, score=config.score, show=True)
    if config.refit_tokens:
        text = _blocks(model, config, tokens=config.refit_tokens, after=ranked_on.documents)
        refit(model, text, rank=config.refit_rank, show=True)
    model.save_pretrained(config.out, overwrite=config.overwrite, beside={asked.name: wanted})
    return model
