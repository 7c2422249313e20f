"""Sensitivity: how much the loss rises when one sub-layer is narrowed, and the greedy choice by these increases.

Shapes: B blocks in a batch, T tokens, V vocabulary, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from flextron.atomic import write_text
from flextron.data.blocks import TokenBlocks, blocks_after
from flextron.elastic.loss import logits_of
from flextron.elastic.model import ElasticModel
from flextron.elastic.source import search_space_in
from flextron.elastic.walk import batch_within, walking
from flextron.errors import CheckpointError, SubnetError
from flextron.progress import bar
from flextron.records import checked, read_record
from flextron.subnet import AXES, SearchSpace, Subnet

VERSION = 1
FILE = "sensitivity.json"
BATCH_TOKENS = 1024
"""Number of tokens in one batch, at most."""
Widths = dict[str, tuple[int, ...]]
"""Widths to measure, by axis."""
SECOND_SHARE = 0.6
"""Share of the layers' weights in the sub-network around which the second half of the tokens is measured."""
COUNTS = {"neurons": 1.0, "kv_groups": 2.0}
"""How often an increase counts where a sub-network is chosen, by axis. The mean loss understates what attention is
worth: few tokens repeat what stands far before them, and answers do (docs/decisions/0003-sensitivity.md)."""


@dataclass(frozen=True)
class Sensitivity:
    """Loss increases in nats per token when one sub-layer is narrowed, as `measure_sensitivity` measures them.

    `increases["neurons"][l][i]` is the increase of layer l at `widths["neurons"][i]` neurons. Widths ascend to the full
    one, whose increase is 0. `unit_weights["neurons"][l]` is the number of weights in a neuron of layer l.
    """

    search_space: SearchSpace
    widths: dict[str, tuple[int, ...]]
    increases: dict[str, tuple[tuple[float, ...], ...]]
    unit_weights: dict[str, tuple[int, ...]]
    tokens: int
    text: str

    def allocate(self, share: float) -> Subnet:
        """Return the sub-network with the least sum of loss increases among those of at most `share` of the weights.

        Attention's increases count twice (`COUNTS`). All are interpolated between measured widths, and each curve is
        replaced by its lower convex hull. Then weights are removed where the loss per weight is least. On the hulls
        this is the exact optimum, up to the last step.

        Args:
            share: part of the layers' weights to keep.

        Raises:
            SubnetError: `share` is below the smallest sub-network's, or above 1.
        """
        space = self.search_space
        total = self._weights(space.full)
        smallest = self.share(space.smallest)
        if not smallest <= share <= 1:
            raise SubnetError(
                f"a share of {share:.0%} of the layers' weights is not between the smallest sub-network's "
                f"({smallest:.0%}) and 100%."
            )
        subnet = space.full
        for step in sorted(self._steps(), key=lambda step: (step.price, -step.down_to)):
            excess = self._weights(subnet) - share * total
            kept = subnet[step.axis][step.layer]
            if excess <= 0:
                break
            if kept <= step.down_to:  # rounding can sort a lower step of nearly the same price first
                continue
            choices = [width for width in space[step.axis] if step.down_to <= width < kept]
            unit = self.unit_weights[step.axis][step.layer]
            enough = [width for width in choices if (kept - width) * unit >= excess]
            subnet = subnet.with_width(step.axis, step.layer, max(enough, default=step.down_to))
        return subnet

    def share(self, subnet: Subnet) -> float:
        """Return the share of the layers' weights that `subnet` keeps, as `ElasticModel.share`."""
        return self._weights(subnet) / self._weights(self.search_space.full)

    def curves(self, axis: str, *, counted: bool = False) -> np.ndarray[Any, Any]:
        """Return the increase of every layer at every choice of the search space on one axis, [L, choices].

        Increases are interpolated between measured widths; a wider choice never has a larger one.

        Args:
            counted: as they count in a choice (`COUNTS`): attention's twice. Otherwise in nats.
        """
        rising = [np.maximum.accumulate(row[::-1])[::-1] for row in self.increases[axis]]
        in_nats = np.array([np.interp(self.search_space[axis], self.widths[axis], row) for row in rising])
        return COUNTS[axis] * in_nats if counted else in_nats

    def _steps(self) -> Iterator[_Step]:
        for axis in AXES:
            choices = np.array(self.search_space[axis])
            for layer, losses in enumerate(self.curves(axis, counted=True)):
                corners = _lower_hull(choices, losses)
                for low, high in pairwise(corners):
                    weights = (choices[high] - choices[low]) * self.unit_weights[axis][layer]
                    yield _Step((losses[low] - losses[high]) / weights, axis, layer, int(choices[low]))

    def _weights(self, subnet: Subnet) -> int:
        return sum(
            width * unit for axis in AXES for width, unit in zip(subnet[axis], self.unit_weights[axis], strict=True)
        )

    def save(self, folder: str | Path) -> None:
        """Write sensitivity.json into a checkpoint's folder, whole or not at all."""
        write_text(Path(folder) / FILE, json.dumps({"version": VERSION, **asdict(self)}) + "\n")

    @staticmethod
    def is_in(folder: str | Path) -> bool:
        """Return whether the folder has a sensitivity.json."""
        return (Path(folder) / FILE).is_file()

    @classmethod
    def load(cls, folder: str | Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or of another search space than the
                checkpoint in the folder.
        """
        file, space = Path(folder) / FILE, search_space_in(folder)
        try:
            sensitivity = checked(read_record(file, version=VERSION), cls)
            sensitivity.check(space or sensitivity.search_space)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {file}: {str(error).rstrip('.')}. Rank again.") from error
        return sensitivity

    def check(self, space: SearchSpace) -> None:
        """Pass if these are measurements of every layer of a model with this search space.

        Raises:
            ValueError: they are of another one, or do not go together.
        """
        if self.search_space != space:
            raise ValueError("it belongs to a checkpoint with another search space")
        for axis in AXES:
            widths, units = self.widths.get(axis, ()), self.unit_weights.get(axis, ())
            if not set(widths) <= set(space[axis]) or list(widths) != sorted(set(widths)):
                raise ValueError(f"widths.{axis} is {list(widths)}, not ascending widths of the search space")
            if (*widths[:1], *widths[-1:]) != (space[axis][0], space[axis][-1]):
                raise ValueError(f"widths.{axis} do not reach from {space[axis][0]} to {space[axis][-1]}")
            if [len(row) for row in self.increases.get(axis, ())] != [len(widths)] * space.layers:
                raise ValueError(f"increases.{axis} are not {len(widths)} for each of the {space.layers} layers")
            if len(units) != space.layers or min(units) < 1:
                raise ValueError(f"unit_weights.{axis} is {list(units)}, not a number above 0 for each layer")


class _Step(NamedTuple):
    """One edge of a hull: narrowing to `down_to` units costs `price` nats per weight."""

    price: float
    axis: str
    layer: int
    down_to: int


def sensitivity_blocks(
    tokenizer: PreTrainedTokenizerBase | None, text: str | Path, *, tokens: int, after: int = 0, block_tokens: int = 256
) -> TokenBlocks:
    """Return blocks of 256 tokens from many documents, each cut at 1,000 characters, so that few tokens vary much.

    Args:
        after: number of documents to skip, because text that the model was ranked on makes removals look cheaper than
            they are (docs/decisions/0003-sensitivity.md). If too little text would remain, nothing is skipped.

    Raises:
        FlextronError: as `load_blocks`.
    """
    return blocks_after(tokenizer, text, after, tokens=tokens, block_tokens=block_tokens, max_characters=1000)


def measure_sensitivity(model: ElasticModel, blocks: TokenBlocks, *, show: bool = False) -> Sensitivity:
    """Narrow one sub-layer at a time and measure the loss, always on the same tokens.

    The loss is half cross-entropy to the text and half to the full model's own predictions, which has less noise. Each
    MLP is measured at five widths (0, 1/4, 1/2, 3/4, full) and each attention at every number of KV groups.

    What a unit is worth depends on what else is gone. So half of the blocks are measured around the full model, and
    half around the 60% sub-network that the first half leads to. The increases are the mean of both. Layers below the
    changed one are not computed again. Each layer runs for all changes before the next one, so its weights are read
    once for a batch; between layers one hidden state for each change is kept.
    """
    model.check_tokens(blocks.tokens)
    space = model.search_space
    widths = {**{axis: space[axis] for axis in AXES}, "neurons": _parts(space.neurons, 4)}
    halves = [half for half in blocks.tokens.tensor_split(2) if len(half)]
    steps = sum(len(batches_for(model, half, widths)) for half in halves) * space.layers
    with bar(steps, description="sensitivity", show=show) as advance, torch.inference_mode():
        increases = loss_increases(model, halves[0], space.full, widths, advance)
        sensitivity = sensitivity_of(model, blocks, widths, increases)
        if len(halves) == 1:
            return sensitivity
        around = sensitivity.allocate(max(SECOND_SHARE, sensitivity.share(space.smallest)))
        narrow = loss_increases(model, halves[1], around, widths, advance)
    return replace(sensitivity, increases=frozen({axis: (increases[axis] + narrow[axis]) / 2 for axis in AXES}))


def loss_increases(
    model: ElasticModel,
    tokens: torch.Tensor,
    around: Subnet,
    widths: Widths,
    advance: Callable[[], None],
    *,
    text_weight: float = 0.5,
) -> dict[str, np.ndarray[Any, Any]]:
    """Return, by axis, how much the loss rises when one sub-layer of `around` is narrowed from full, [L, widths]."""
    losses = {axis: np.zeros((around.layers, len(widths[axis]))) for axis in AXES}
    for tokens_BT in batches_for(model, tokens, widths):
        part = len(tokens_BT) / len(tokens)
        loss_of = _changed_losses(model, tokens_BT.to(model.device), around, widths, advance, text_weight)
        for layer in range(around.layers):
            for axis, index, subnet in _changes(around, widths, layer):
                losses[axis][layer, index] += loss_of[subnet] * part
    return {axis: losses[axis] - losses[axis][:, -1:] for axis in AXES}


def batches_of(tokens: torch.Tensor, most: int = BATCH_TOKENS) -> tuple[torch.Tensor, ...]:
    """Split blocks into batches of at most so many tokens, but at least one block."""
    return torch.split(tokens, max(1, most // tokens.shape[1]))


def batches_for(model: ElasticModel, tokens: torch.Tensor, widths: Widths) -> tuple[torch.Tensor, ...]:
    """Split blocks into batches in which every one of these widths of every layer can be measured at once."""
    changes = sum(len(widths[axis]) for axis in AXES) * len(model.layers)
    return batches_of(tokens, batch_within(model, states=changes, most=BATCH_TOKENS))


def _changed_losses(
    model: ElasticModel,
    tokens_BT: torch.Tensor,
    around: Subnet,
    widths: Widths,
    advance: Callable[[], None],
    text_weight: float,
) -> dict[Subnet, float]:
    """The loss on one batch of `around` with every change of one sub-layer."""
    full = model.search_space.full
    hidden: dict[Subnet, Any] = {full: None, around: None}
    with walking(model) as walk:
        for layer in range(around.layers):
            below = hidden[around]
            hidden |= {subnet: below for _, _, subnet in _changes(around, widths, layer) if subnet not in hidden}
            for subnet, hidden_BTD in hidden.items():
                with model.use(subnet):
                    hidden[subnet] = walk.through(layer, tokens_BT, hidden_BTD)
            advance()
        for subnet, hidden_BTD in hidden.items():
            hidden[subnet] = walk.finish(tokens_BT, hidden_BTD)
    losses = dict.fromkeys(hidden, 0.0)
    for row, tokens_T in enumerate(tokens_BT):
        probabilities_TV = logits_of(model.lm, hidden[full][row]).float().softmax(-1)
        for subnet, hidden_BTD in hidden.items():
            logits_TV = logits_of(model.lm, hidden_BTD[row])
            losses[subnet] += _mixed_loss(logits_TV, tokens_T, probabilities_TV, text_weight) / len(tokens_BT)
    return losses


def sensitivity_of(
    model: ElasticModel, blocks: TokenBlocks, widths: Widths, increases: dict[str, np.ndarray[Any, Any]]
) -> Sensitivity:
    """The sensitivities of a model from increases, [L, widths] by axis, on a text."""
    return Sensitivity(
        search_space=model.search_space,
        widths=widths,
        increases=frozen(increases),
        unit_weights=model.unit_weights,
        tokens=blocks.predicted_tokens,
        text=blocks.text,
    )


def frozen(increases: dict[str, np.ndarray[Any, Any]]) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Increases as `Sensitivity` holds them."""
    return {axis: tuple(map(tuple, rows.tolist())) for axis, rows in increases.items()}


def _changes(around: Subnet, widths: Widths, layer: int) -> Iterator[tuple[str, int, Subnet]]:
    """Yield `around` with every width of one layer, axis by axis."""
    for axis in AXES:
        for index, width in enumerate(widths[axis]):
            yield axis, index, around.with_width(axis, layer, width)


def full_predictions(model: ElasticModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Return the full model's probabilities at each position, [B, T, V] in fp32."""
    with model.use(model.search_space.full):
        logits_BTV: torch.Tensor = model(tokens_BT, use_cache=False).logits
    return logits_BTV.float().softmax(-1)


def mixed_loss(
    model: ElasticModel, tokens_BT: torch.Tensor, probabilities_BTV: torch.Tensor, *, text_weight: float = 0.5
) -> float:
    """Return the mean of two cross-entropies over predicted tokens: to the text, and to the full model's predictions.

    On text that is typical of the model both rise alike, but the second has no noise from single tokens.
    """
    logits_BTV = model(tokens_BT, use_cache=False).logits
    rows = zip(logits_BTV, tokens_BT, probabilities_BTV, strict=True)
    return sum(_mixed_loss(*row, text_weight) for row in rows) / len(tokens_BT)


def _mixed_loss(
    logits_TV: torch.Tensor, tokens_T: torch.Tensor, probabilities_TV: torch.Tensor, text_weight: float
) -> float:
    logits = logits_TV[:-1].float()
    to_text = logits.gather(1, tokens_T[1:, None])[:, 0]
    to_full = torch.linalg.vecdot(logits, probabilities_TV[:-1])  # both in fp32
    losses = logits.logsumexp(-1) - text_weight * to_text - (1 - text_weight) * to_full
    return float(losses.mean())


def _parts(choices: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the choices that cut the full width into `count` nearly equal parts, 0 and the full width included."""
    cuts = [choices[-1] * part / count for part in range(count + 1)]
    return tuple(sorted({min(choices, key=lambda width: abs(width - cut)) for cut in cuts}))


def _lower_hull(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> list[int]:
    """Return the indices of the corners of the lower convex hull of points with ascending x, both ends included."""
    hull: list[int] = []
    for point in range(len(x)):
        while len(hull) > 1 and _turns_up(x, y, hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_up(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], a: int, b: int, c: int) -> bool:
    """Return whether b lies on or above the line from a to c."""
    return bool((y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a]))
