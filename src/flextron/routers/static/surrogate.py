"""The surrogate: a small network that predicts the loss of a sub-network from its choices.

Flextron (Cai et al., ICML 2024), section 4.3 and figure 3: it replaces the LLM while a router learns. Ours: it starts
as the sum of the measured sensitivities and learns what that sum misses.

Shapes: N sub-networks, S sub-layers, K choices, P basis functions, E hidden effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from flextron.environment import one_thread
from flextron.ranking.sensitivity import COUNTS, Sensitivity
from flextron.records import MAY_BE_NAN
from flextron.routers.choices import Floats, Indices, increase_matrix, parts_left_out
from flextron.routers.state import load_state
from flextron.subnet import AXES, SearchSpace

EFFECTS = 4
HIDDEN = 32
STEPS = 800
LEARNING_RATE = 0.01
NEAR_FULL = 0.3
"""A pair this many nats above the least loss gets half the weight: errors at small budgets matter less."""
PULL_OF_SCALES = 0.01
"""Weight of the penalty on learnt factors, which pulls towards the plain sum of sensitivities."""
PULL_OF_EFFECTS = 0.1
"""Weight of the penalty on learnt effects; of 0.03 to 1, 0.1 predicts best."""


@dataclass(frozen=True)
class SurrogateError:
    """Errors of the surrogate's predictions on sub-networks that it was not trained on."""

    mean_absolute: float
    """Nats per token."""
    rank_correlation: Annotated[float, MAY_BE_NAN]
    """Spearman's rank correlation."""
    pairs: int
    """Number of sub-networks compared."""

    @classmethod
    def of(cls, predicted_N: Floats, measured_N: Floats) -> SurrogateError:
        """Compare N predictions with N measurements."""
        rank = float(spearmanr(predicted_N, measured_N)[0]) if len(measured_N) > 2 else float("nan")
        return cls(float(np.abs(predicted_N - measured_N).mean()), rank, len(measured_N))

    def __str__(self) -> str:
        return (
            f"mean absolute error {self.mean_absolute:.3f} nats, rank correlation {self.rank_correlation:.3f} "
            f"on {self.pairs} unseen sub-networks"
        )


class Surrogate(nn.Module):
    """Predicts loss in nats per token from choices, one-hot or relaxed.

    Each sub-layer's choice contributes its sensitivity, times a learnt factor, and E learnt effects, which are smooth
    functions of the part left out. A network with one hidden layer turns the sums over sub-layers into the loss. Before
    training the prediction is the plain sum of sensitivities.
    """

    increases_SK: torch.Tensor
    basis_SKP: torch.Tensor

    def __init__(self, increases_SK: Floats, left_out_SK: Floats, *, seed: int = 0) -> None:
        super().__init__()
        left_out = torch.tensor(left_out_SK, dtype=torch.float32)
        basis = torch.stack([left_out, left_out**2, left_out**4, (left_out == 1).float()], -1)
        self.register_buffer("increases_SK", torch.tensor(increases_SK, dtype=torch.float32))
        self.register_buffer("basis_SKP", basis)
        self.scales_S = nn.Parameter(torch.zeros(len(increases_SK)))
        self.base = nn.Parameter(torch.zeros(2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.effects_SPE = nn.Parameter(0.05 * torch.randn(len(increases_SK), basis.shape[-1], EFFECTS))
            self.hidden = nn.Linear(1 + EFFECTS, HIDDEN)
            self.out = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @classmethod
    def of(cls, sensitivity: Sensitivity) -> Surrogate:
        """Return an untrained surrogate for the search space of `sensitivity`."""
        return cls(increase_matrix(sensitivity), parts_left_out(sensitivity.search_space))

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor], space: SearchSpace) -> Surrogate:
        """Return the surrogate for this search space that had this `state_dict()`.

        Raises:
            ValueError: it was none's.
        """
        left_out_SK = parts_left_out(space)
        surrogate = cls(np.zeros_like(left_out_SK), left_out_SK)
        load_state(surrogate, state)
        return surrogate

    def _untrained(self, seed: int) -> Surrogate:
        left_out_SK = np.asarray(self.basis_SKP[..., 0].double())
        return Surrogate(np.asarray(self.increases_SK.double()), left_out_SK, seed=seed)

    def forward(self, choices_NSK: torch.Tensor) -> torch.Tensor:
        """Predict the losses of choices, one-hot or relaxed, [N]."""
        increases_NS = (choices_NSK * self.increases_SK).sum(-1)
        return self._from_features(increases_NS, torch.einsum("nsk,skp->nsp", choices_NSK, self.basis_SKP))

    def counted(self, choices_NSK: torch.Tensor) -> torch.Tensor:
        """The losses of choices as they count in a choice, [N]: with the increases that `COUNTS` adds."""
        layers = len(self.increases_SK) // len(AXES)
        more_S = torch.tensor([COUNTS[axis] - 1 for axis in AXES]).repeat_interleave(layers)
        more_N = (choices_NSK * self.increases_SK).sum(-1) @ more_S
        losses_N: torch.Tensor = self(choices_NSK) + more_N
        return losses_N

    def _from_features(self, increases_NS: torch.Tensor, basis_NSP: torch.Tensor) -> torch.Tensor:
        sums_N = increases_NS @ self.scales_S.exp()
        effects_NE = basis_NSP.flatten(1) @ self.effects_SPE.flatten(0, 1) / 10
        hidden_NH = torch.tanh(self.hidden(torch.cat([sums_N[:, None], effects_NE], 1)))
        losses_N: torch.Tensor = self.base[0] + self.base[1].exp() * sums_N + self.out(hidden_NH)[:, 0]
        return losses_N

    def _features(self, indices_NS: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sensitivities and basis functions of choices, [N, S] and [N, S, P]."""
        every_S = torch.arange(len(self.increases_SK))
        chosen_NS = torch.as_tensor(indices_NS)
        return self.increases_SK[every_S, chosen_NS], self.basis_SKP[every_S, chosen_NS]

    @torch.no_grad()
    def predict(self, indices_NS: Indices) -> Floats:
        """Predict the losses of sub-networks, given as indices of their choices, [N]."""
        return np.asarray(self._from_features(*self._features(indices_NS)).double())

    def fit(self, indices_NS: Indices, losses_N: Sequence[float] | Floats, *, seed: int = 0) -> Surrogate:
        """Train on measured pairs, starting again from the sensitivities; returns itself."""
        with one_thread(), torch.enable_grad():
            self.load_state_dict(self._untrained(seed).state_dict())
            self._learn(self._features(indices_NS), torch.tensor(np.asarray(losses_N), dtype=torch.float32))
        return self

    def _learn(self, features: tuple[torch.Tensor, torch.Tensor], losses_N: torch.Tensor) -> None:
        with torch.no_grad():
            self.base[0] = losses_N.min()
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        weights_N = 1 / (NEAR_FULL + losses_N - losses_N.min())
        weights_N = weights_N / weights_N.mean()
        for _ in range(STEPS):
            errors_N = F.huber_loss(self._from_features(*features), losses_N, delta=0.1, reduction="none")
            error = (weights_N * errors_N).mean()
            pull = PULL_OF_SCALES * self.scales_S.square().sum() + PULL_OF_EFFECTS * self.effects_SPE.square().sum()
            optimizer.zero_grad()
            (error + pull).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def cross_validated(
    surrogate: Surrogate, indices_NS: Indices, losses_N: Floats, *, folds: int = 5, seed: int = 0
) -> SurrogateError:
    """Return the error on pairs left out of training, each left out once; `surrogate` itself does not change."""
    order = np.random.default_rng(seed).permutation(len(losses_N))
    predicted = np.zeros(len(losses_N))
    for fold in range(folds):
        out = order[fold::folds]
        rest = np.setdiff1d(order, out)
        predicted[out] = (
            surrogate._untrained(seed).fit(indices_NS[rest], losses_N[rest], seed=seed).predict(indices_NS[out])
        )
    return SurrogateError.of(predicted, losses_N)
