"""`Router`: a trained static router with its surrogate and its record; it answers budgets, saves and loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flextron.atomic import new_folder
from flextron.costs.pricing import Ceiling
from flextron.elastic.model import ElasticModel
from flextron.errors import RouterError
from flextron.records import checked, read_record
from flextron.routers.about import MadeFrom, checked_about
from flextron.routers.choices import Floats, Indices, Mask, allowed, to_indices, usable
from flextron.routers.static.answering import answer
from flextron.routers.static.net import StaticRouter
from flextron.routers.static.pairs import FOLDER
from flextron.routers.static.surrogate import Surrogate, SurrogateError
from flextron.subnet import SearchSpace, Subnet

VERSION = 1
WEIGHTS = "router.safetensors"
ABOUT = "router.json"


@dataclass(frozen=True)
class Check:
    """Measured losses of the answers to one budget: the trained router's and the untrained (greedy) one's."""

    budget: float
    """Share of the full model's cost."""
    subnet: Subnet
    loss: float
    """Nats per token of `subnet`, the trained router's answer, on the tokens that the router was trained on."""
    greedy_loss: float
    """Nats per token of the untrained router's answer."""


@dataclass(frozen=True)
class RouterAbout(MadeFrom):
    """What a router was made from, and how good it is."""

    pairs: int
    """Number of measured sub-networks."""
    error: SurrogateError
    """Error on the last sub-networks that the router explored, before the surrogate saw them."""
    cross_validated: SurrogateError
    """Error on all pairs, each left out of the fit once."""
    checks: tuple[Check, ...]
    kept: bool = False
    """Whether the weights were trained further at this router's answers: the checks are measured after that; the
    surrogate and its errors are from before, so its losses are too high."""


@dataclass(frozen=True)
class Router:
    """A static router and the surrogate that it learnt from. Choosing takes milliseconds."""

    search_space: SearchSpace
    net: StaticRouter
    surrogate: Surrogate
    about: RouterAbout

    def choose(self, ceilings: Sequence[Ceiling], *, neuron_step: int | None = None) -> Subnet:
        """Choose the best sub-network that keeps all `ceilings`; check them first with `pricing.check_possible`.

        Args:
            neuron_step: allow only the full MLP width and multiples of this.

        Raises:
            ValueError: the search space has no multiples of `neuron_step`.
        """
        if neuron_step is not None:
            return route_along(self.net, self.search_space, ceilings, neuron_step=neuron_step)
        return answer(self.search_space, *self._path_and_utilities, ceilings, allowed(self.search_space))

    @cached_property
    def _path_and_utilities(self) -> tuple[Indices, Floats]:
        return path_and_utilities(self.net, allowed(self.search_space))

    def predicted_loss(self, subnet: Subnet) -> float:
        """Return the surrogate's prediction, in nats per token of the text that it learnt from."""
        return float(self.surrogate.predict(to_indices(self.search_space, [subnet]))[0])

    def save(self, folder: str | Path, model: ElasticModel) -> Path:
        """Write or replace routers/METRIC in a checkpoint's folder, whole or not at all; returns the path."""
        target = Path(folder) / FOLDER / self.about.metric
        tensors = {
            f"{part}.{name}": tensor.detach().contiguous()
            for part, module in (("router", self.net), ("surrogate", self.surrogate))
            for name, tensor in module.state_dict().items()
        }
        about = {
            "version": VERSION,
            "fingerprint": model.fingerprint(),
            "search_space": asdict(self.search_space),
            **asdict(self.about),
        }
        with new_folder(target, overwrite=True, kind=ABOUT) as partial:
            save_file(tensors, partial / WEIGHTS)
            (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")
        return target

    @classmethod
    def load(cls, folder: str | Path, metric: str, model: ElasticModel) -> Router:
        """Read the router for `metric` from a checkpoint's folder.

        Raises:
            RouterError: missing, damaged, of another version, or trained for other weights than the model's.
        """
        source = Path(folder) / FOLDER / metric
        way_out = f"Train one: flextron train-router {folder}"
        if not (source / ABOUT).is_file():
            raise RouterError(f"{folder} has no router for {metric}. {way_out}")
        try:
            data = read_record(source / ABOUT, version=VERSION)
            space = checked(data.pop("search_space", None), SearchSpace, "search_space")
            if data.pop("fingerprint", None) != model.fingerprint() or space != model.search_space:
                raise RouterError(f"the router in {source} was trained for another checkpoint. {way_out}")
            tensors = load_file(source / WEIGHTS)
            states = [
                {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(part)}
                for part in ("router.", "surrogate.")
            ]
            nets = StaticRouter.from_state(states[0], space), Surrogate.from_state(states[1], space)
            return cls(space, *nets, checked_about(data, RouterAbout, metric))
        except (OSError, ValueError, SafetensorError) as error:
            raise RouterError(f"cannot read the router in {source}: {str(error).rstrip('.')}. {way_out}") from None


def metrics_with_router(folder: str | Path) -> list[str]:
    """Return the metrics that the checkpoint in `folder` has a router for."""
    names = (file.parent.name for file in (Path(folder) / FOLDER).glob(f"*/{ABOUT}"))
    return sorted(name for name in names if not name.startswith("."))  # a killed save leaves .NAME.partial-*


def route_along(
    net: StaticRouter, space: SearchSpace, ceilings: Sequence[Ceiling], *, neuron_step: int | None = None
) -> Subnet:
    """Return the answer of a router, trained or not, to limits."""
    usable_SK = usable(space, neuron_step)
    return answer(space, *path_and_utilities(net, usable_SK), ceilings, usable_SK)


@torch.no_grad()
def path_and_utilities(net: StaticRouter, usable_SK: Mask) -> tuple[Indices, Floats]:
    """Return what `answer` needs of a router: its path of nested sub-networks [N, S] and its utilities [S, K]."""
    return net.path(usable_SK), np.asarray(net.utilities_SK.double())
