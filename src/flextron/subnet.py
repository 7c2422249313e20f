"""`Subnet`, which every stage takes or returns, and `SearchSpace`, the widths that it may have. No torch here."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flextron.errors import SubnetError
from flextron.records import RecordError, parse_record

SUBNET_VERSION = 1
AXES = ("neurons", "kv_groups")
"""The ways in which a layer narrows, each a field of Subnet and of SearchSpace."""


@dataclass(frozen=True)
class Subnet:
    """The number of units that run in each layer. Units are ranked, so k units are always the first k.

    Layer i runs `neurons[i]` MLP neurons and `kv_groups[i]` KV groups (a key/value head with its query heads).
    0 skips the sub-layer, so only the residual passes.
    """

    neurons: tuple[int, ...]
    kv_groups: tuple[int, ...]

    def __post_init__(self) -> None:
        for axis in AXES:
            widths: Any = self[axis]  # before it is checked, whatever a caller gave
            if not isinstance(widths, Sequence) or isinstance(widths, str):
                raise SubnetError(f"{axis} must be one whole number per layer, not {widths!r}.")
            object.__setattr__(self, axis, tuple(widths))
            for layer, width in enumerate(widths):
                if isinstance(width, bool) or not isinstance(width, int) or width < 0:
                    raise SubnetError(f"{axis}[{layer}] is {width!r}; a width is a whole number from 0 up.")
        if not self.neurons or len(self.neurons) != len(self.kv_groups):
            raise SubnetError(
                f"a Subnet needs one width per layer on both axes; got {len(self.neurons)} widths of neurons "
                f"and {len(self.kv_groups)} of kv_groups."
            )

    def __getitem__(self, axis: str) -> tuple[int, ...]:
        """Widths of every layer on one of AXES."""
        widths: tuple[int, ...] = getattr(self, axis)
        return widths

    def with_width(self, axis: str, layer: int, width: int) -> Subnet:
        """The same sub-network with another width of one sub-layer."""
        widths = self[axis]
        return replace(self, **{axis: (*widths[:layer], width, *widths[layer + 1 :])})

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.neurons)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have equal widths."""
        return all(len(set(self[axis])) == 1 for axis in AXES)

    def __str__(self) -> str:
        if self.is_uniform:
            return f"{self.layers} layers of {self.neurons[0]} neurons, {self.kv_groups[0]} KV groups"
        return (
            f"{self.layers} layers of {min(self.neurons)} to {max(self.neurons)} neurons, "
            f"{min(self.kv_groups)} to {max(self.kv_groups)} KV groups"
        )

    def to_json(self) -> str:
        """Write the widths as one JSON object (docs/formats.md). `from_json` reads it back."""
        return json.dumps({"version": SUBNET_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Subnet:
        """Read what `to_json` wrote.

        Raises:
            SubnetError: `text` is not JSON, has another version, or has missing or unknown keys.
        """
        try:
            return cls(**parse_record(text, version=SUBNET_VERSION, keys=AXES))
        except RecordError as error:
            raise SubnetError(f"not a Subnet: {error}.") from None

    @classmethod
    def load(cls, path: str | Path) -> Subnet:
        """Read a Subnet from a JSON file.

        Raises:
            SubnetError: the file does not exist or holds no Subnet; the message names it.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf8"))
        except (OSError, UnicodeDecodeError, SubnetError) as error:
            raise SubnetError(f"cannot read a Subnet from {path}: {error}") from None


@dataclass(frozen=True)
class SearchSpace:
    """The widths that each layer may have, in ascending order. The last of each axis is the full model's.

    Every layer has the same choices. 0, if it is among them, skips the sub-layer.
    """

    layers: int
    neurons: tuple[int, ...]
    kv_groups: tuple[int, ...]

    def __post_init__(self) -> None:
        if type(self.layers) is not int or self.layers < 1:
            raise ValueError(f"a search space needs a whole number of layers from 1 up, got {self.layers!r}.")
        for axis in AXES:
            choices = tuple(self[axis])
            object.__setattr__(self, axis, choices)
            whole = all(type(choice) is int for choice in choices)
            if not choices or not whole or list(choices) != sorted(set(choices)) or choices[0] < 0 or choices[-1] < 1:
                raise ValueError(f"{axis} must be ascending widths from 0 up, without repeats, got {list(choices)}.")

    def __getitem__(self, axis: str) -> tuple[int, ...]:
        """Widths to choose from on one of AXES, ascending."""
        choices: tuple[int, ...] = getattr(self, axis)
        return choices

    @property
    def sizes(self) -> dict[str, int]:
        """Layers, and units of a layer on each axis, of the model that this space is for."""
        return {"layers": self.layers, **{axis: self[axis][-1] for axis in AXES}}

    @classmethod
    def of_model(
        cls, *, layers: int, neurons: int, kv_groups: int, neuron_step: int | None = None, least_neurons: int = 1
    ) -> SearchSpace:
        """Make the default space: 0, the multiples of `neuron_step` and the full width; any number of KV groups.

        `neuron_step` defaults to the largest power of two that gives at least 16 steps (64 for 1,536 neurons,
        512 for 11,008). So there are few widths to search, and hardware runs them well. Widths between 0 and
        `least_neurons` are left out.
        """
        step = 1 << max(0, (neurons // 16).bit_length() - 1) if neuron_step is None else neuron_step
        if not 1 <= step <= neurons:
            raise ValueError(f"neuron_step is {step}; it must lie between 1 and the model's {neurons} neurons.")
        widths = {*range(0, neurons, step), neurons}
        if least_neurons > 1:
            widths = {0, least_neurons, *(width for width in widths if width > least_neurons)}
        return cls(layers, tuple(sorted(widths)), tuple(range(kv_groups + 1)))

    @property
    def full(self) -> Subnet:
        """The whole model."""
        return self.uniform(**{axis: self[axis][-1] for axis in AXES})

    @property
    def smallest(self) -> Subnet:
        """The smallest sub-network of the space."""
        return self.uniform(**{axis: self[axis][0] for axis in AXES})

    def uniform(self, neurons: int | None = None, kv_groups: int | None = None) -> Subnet:
        """Make a Subnet with equal widths in all layers. An axis left out stays full."""
        named = {"neurons": neurons, "kv_groups": kv_groups}
        widths = {axis: self[axis][-1] if width is None else width for axis, width in named.items()}
        subnet = Subnet(**{axis: (width,) * self.layers for axis, width in widths.items()})
        self.check(subnet)
        return subnet

    def check(self, subnet: Subnet) -> None:
        """Raise an error unless `subnet` lies in this space.

        Raises:
            SubnetError: it has another number of layers, a width above the model's, or a width that is no choice.
        """
        if subnet.layers != self.layers:
            raise SubnetError(
                f"this Subnet is for a model of {subnet.layers} layers; this model has {self.layers}. "
                "A Subnet belongs to the checkpoint it was chosen for."
            )
        for axis in AXES:
            choices = self[axis]
            for layer, width in enumerate(subnet[axis]):
                if width > choices[-1]:
                    raise SubnetError(f"{axis}[{layer}] is {width}; a layer of this model has {choices[-1]}.")
                if width not in choices:
                    raise SubnetError(
                        f"{axis}[{layer}] is {width}, not a choice of the search space; the nearest are "
                        f"{_neighbours(choices, width)}. Use one of them or a search space with a smaller step."
                    )


def _neighbours(choices: tuple[int, ...], width: int) -> str:
    at = bisect_left(choices, width)
    return " and ".join(str(choice) for choice in choices[max(0, at - 1) : at + 1])
