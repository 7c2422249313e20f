"""One sub-network as a model of its own for another engine, which appears only if it computes what it should."""

from pathlib import Path

from flextron.atomic import check_new, check_new_file
from flextron.elastic.model import ElasticModel
from flextron.errors import ExportError
from flextron.exporting.cutting import refuse_odd_heads
from flextron.exporting.gguf.file import MAGIC, GgufReport, export_gguf, refuse_in_gguf
from flextron.exporting.hf import ExportReport, check_not_elastic, export
from flextron.subnet import AXES, Subnet

__all__ = ["ExportReport", "GgufReport", "can_state", "check_free", "export", "export_gguf", "refuse_in_gguf"]


def check_free(out: Path, *, to: str, overwrite: bool) -> None:
    """Pass if `out` is free for an export, so that it is known before a model is loaded.

    Raises:
        CheckpointError: something is there already, and `overwrite` is false or it is of another kind.
    """
    if to == "gguf":
        check_new_file(out, overwrite=overwrite, magic=MAGIC)
    else:
        check_not_elastic(out)
        check_new(out, overwrite=overwrite)


def can_state(model: ElasticModel, subnet: Subnet, *, to: str, quantize: str) -> bool:
    """Whether an engine has a place for these widths, none of them 0."""
    try:
        if to == "gguf":
            refuse_in_gguf(model, subnet, quantize)
        else:
            refuse_odd_heads(model, subnet)
    except ExportError:
        return False
    return not any(0 in subnet[axis] for axis in AXES)
