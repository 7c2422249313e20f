"""Read the name of a sub-network: `full`, `60%`, `neurons=768,kv_groups=2` or a JSON file."""

from __future__ import annotations

from pathlib import Path

from flextron.elastic.model import ElasticModel
from flextron.errors import SubnetError
from flextron.ranking.sensitivity import Sensitivity
from flextron.subnet import AXES, Subnet

FORMS = "full, a share such as 60%, equal widths such as neurons=768,kv_groups=2, or a Subnet's JSON file"


def choose(
    model: ElasticModel, name: str, folder: str | Path | None = None, *, sensitivity: Sensitivity | None = None
) -> Subnet:
    """Return the sub-network of `model` called `name`.

    Args:
        name: "full"; "60%", the greedy choice for that share of the layers' weights; "neurons=768", "kv_groups=2" or
            both, in every layer; or the path of a Subnet's JSON file.
        folder: folder of the elastic checkpoint, whose sensitivities a share needs.
        sensitivity: sensitivities to use instead of the folder's.

    Raises:
        SubnetError: `name` has none of these forms, its widths are outside the search space, or it is a share and there
            are no sensitivities.
    """
    if name == "full":
        return model.search_space.full
    if name.endswith("%"):
        share = _share(name)
        return (sensitivity or _sensitivity(name, folder)).allocate(share)
    if "=" in name:
        return _of_widths(model, name)
    if not name.endswith(".json"):
        raise SubnetError(f"cannot read the sub-network {name!r}. Pass {FORMS}.")
    subnet = Subnet.load(name)
    model.search_space.check(subnet)
    return subnet


def _share(name: str) -> float:
    try:
        return float(name[:-1]) / 100
    except ValueError:
        raise SubnetError(f"cannot read the share {name!r}. Write a number and %, such as 60%.") from None


def _sensitivity(name: str, folder: str | Path | None) -> Sensitivity:
    if folder is None or not Sensitivity.is_in(folder):
        raise SubnetError(
            f"{name} needs the sensitivities of an elastic checkpoint, but {folder} has none. "
            "Run `flextron rank MODEL OUT` to measure them, or pass widths, such as neurons=768."
        )
    return Sensitivity.load(folder)


def _of_widths(model: ElasticModel, name: str) -> Subnet:
    widths: dict[str, int] = {}
    for part in name.split(","):
        axis, _, width = part.strip().partition("=")
        if axis not in AXES or axis in widths or not width.isdigit():
            raise SubnetError(f"cannot read the widths {name!r} at {part!r}. Write them like neurons=768,kv_groups=2.")
        widths[axis] = int(width)
    return model.search_space.uniform(**widths)
