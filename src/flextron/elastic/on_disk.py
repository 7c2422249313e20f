"""Keep the weights that ranking changes in files, so that a model may be larger than the memory.

The system reads a page of a file when it is used, and drops it when it needs the memory. Other weights need no file:
`from_pretrained` maps safetensors into memory, and copies only weights whose dtype changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from flextron.atomic import check_space
from flextron.elastic.model import ElasticModel, projections_of
from flextron.errors import CheckpointError, FlextronError


@contextmanager
def weights_on_disk(model: ElasticModel, beside: Path) -> Iterator[None]:
    """Keep the elastic projections in temporary files inside the block. Afterwards the model cannot be used any more.

    Args:
        beside: path next to which the files lie, in a hidden folder.

    Raises:
        FlextronError: the model is not on the CPU.
        CheckpointError: the disk has no room for the files, or they cannot be written.
    """
    if model.device.type != "cpu":
        raise FlextronError(f"weights are streamed to the CPU only, not to {model.device}. Pass --device cpu.")
    weights = [weight for projection in projections_of(model).values() for weight in projection.parameters()]
    check_space(beside, sum(weight.nbytes for weight in weights))
    beside.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{beside.name}-weights-", dir=beside.parent) as folder:
        try:
            for number, weight in enumerate(weights):
                _move(weight, Path(folder) / str(number))
        except OSError as error:
            raise CheckpointError(f"cannot keep weights in {beside.parent}: {error}") from None
        yield


def _move(weight: torch.nn.Parameter, file: Path) -> None:
    """Write a weight to a file and map the file into memory in its place."""
    weight.detach().flatten().view(torch.uint8).numpy().tofile(file)
    mapped = torch.from_file(str(file), shared=True, size=weight.numel(), dtype=weight.dtype)
    weight.data = mapped.view(weight.shape)
