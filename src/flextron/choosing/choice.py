"""Which sub-network a user means: the one place that reads `full`, `60%`, `neurons=768,kv_groups=2` or a file."""

from __future__ import annotations

from pathlib import Path

from flextron.elastic.model import ElasticModel
from flextron.errors import SubnetError
from flextron.ranking.sensitivity import Sensitivity
from flextron.subnet import AXES, Subnet

FORMS = "full, a share such as 60%, equal widths such as neurons=768,kv_groups=2, or a Subnet's JSON file"


def choose(
    model: ElasticModel, wish: str, folder: str | Path | None = None, *, sensitivity: Sensitivity | None = None
) -> Subnet:
    """The sub-network of `model` that `wish` names.

    Args:
        wish: "full"; "60%", the greedy choice for that share of the layers' weights; "neurons=768", "kv_groups=2" or
            both, in every layer; or the path of a Subnet's JSON file.
        folder: the elastic checkpoint, whose sensitivities a share needs.
        sensitivity: to use instead of the folder's.

    Raises:
        SubnetError: none of these forms, widths outside the search space, or a share without sensitivities.
    """
    if wish == "full":
        return model.search_space.full
    if wish.endswith("%"):
        share = _share(wish)
        return (sensitivity or _sensitivity(wish, folder)).allocate(share)
    if "=" in wish:
        return _of_widths(model, wish)
    if not wish.endswith(".json"):
        raise SubnetError(f"cannot read the sub-network {wish!r}; it is one of: {FORMS}.")
    subnet = Subnet.load(wish)
    model.search_space.check(subnet)
    return subnet


def _share(wish: str) -> float:
    try:
        return float(wish[:-1]) / 100
    except ValueError:
        raise SubnetError(f"cannot read the share {wish!r}; write a number and %, such as 60%.") from None


def _sensitivity(wish: str, folder: str | Path | None) -> Sensitivity:
    if folder is None or not Sensitivity.is_in(folder):
        raise SubnetError(
            f"{wish} needs the sensitivities of an elastic checkpoint, and {folder} has none. "
            "Make one with `flextron rank MODEL OUT`, or name widths, such as neurons=768."
        )
    return Sensitivity.load(folder)


def _of_widths(model: ElasticModel, wish: str) -> Subnet:
    widths: dict[str, int] = {}
    for part in wish.split(","):
        axis, _, width = part.strip().partition("=")
        if axis not in AXES or axis in widths or not width.isdigit():
            raise SubnetError(f"cannot read the widths {wish!r} at {part!r}; write such as neurons=768,kv_groups=2.")
        widths[axis] = int(width)
    return model.search_space.uniform(**widths)
