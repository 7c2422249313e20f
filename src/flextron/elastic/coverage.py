"""How much of a model's layers its axes hold, and whether that is enough to be worth narrowing."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from flextron.elastic.families import cannot_narrow
from flextron.elastic.model import ElasticModel

LEAST_NARROWING = 0.25
"""Share of the layers' weights that must lie in units of axes that narrow."""
ENOUGH_NARROWING = 0.5
"""Share from which on there is no warning."""
ENOUGH_HELD = 0.8
"""Share of the layers' weights that the axes should hold, whether they narrow or are left out whole."""


@dataclass(frozen=True)
class Coverage:
    """How much of the layers' weights the axes hold."""

    narrows: float
    """Share in units that can be left out one by one, 0 to 1."""
    whole: float
    """Share in sub-layers that can only be left out as a whole, 0 to 1."""

    @property
    def held(self) -> float:
        """Share that can be left out at all, 0 to 1."""
        return self.narrows + self.whole

    def __str__(self) -> str:
        rest = f"{1 - self.held:.0%} stays"
        return f"{self.narrows:.0%} of the layers' weights narrows, {self.whole:.0%} is left out whole, {rest}"


def coverage_of(model: ElasticModel) -> Coverage:
    """Measure how much of the layers' weights a model's axes hold."""
    held = {True: 0, False: 0}
    for _, _, sub in model.sub_layers():
        held[sub.axis.narrows] += sum(p.numel() for p in sub.unit_parameters())
    total = sum(p.numel() for layer in model.layers for p in layer.module.parameters())
    return Coverage(held[True] / total, held[False] / total)


class CoverageWarning(UserWarning):
    """A model of which little can be left out."""


def check_coverage(model: ElasticModel) -> None:
    """Warn if little of a model narrows.

    Raises:
        UnknownFamilyError: too little.
    """
    found = coverage_of(model)
    if found.narrows < LEAST_NARROWING:
        raise cannot_narrow(model.config.model_type, f"only {found}; at least {LEAST_NARROWING:.0%} must narrow")
    if found.narrows < ENOUGH_NARROWING or found.held < ENOUGH_HELD:
        warnings.warn(f"{model.config.model_type}: {found}.", CoverageWarning, stacklevel=3)
