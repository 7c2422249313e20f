"""One exporter for each target engine. To add an engine, write a class and add it to EXPORTERS."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flextron.atomic import check_new, check_new_file
from flextron.config import ExportConfig
from flextron.costs.saved import LLAMA_CPP
from flextron.elastic.model import ElasticModel
from flextron.errors import ExportError
from flextron.exporting.cutting import refuse_odd_heads
from flextron.exporting.gguf.file import MAGIC, GgufReport, check_states_in_gguf, export_gguf
from flextron.exporting.hf import ExportReport, check_not_elastic, export
from flextron.subnet import AXES, Subnet


class Exporter(ABC):
    """Writes sub-networks for one engine, and knows which ones the engine can run."""

    @property
    @abstractmethod
    def table_engine(self) -> Mapping[str, str]:
        """Options that make `flextron.route` use latency tables measured in this engine."""

    @abstractmethod
    def check_free(self, out: Path, *, overwrite: bool) -> None:
        """Check that an export may be written to `out`; call this before loading a model.

        Raises:
            CheckpointError: `out` exists, and `overwrite` is false or it is not an older export of this kind.
        """

    @abstractmethod
    def check_states(self, model: ElasticModel, subnet: Subnet) -> None:
        """Check that the engine can run these widths.

        Raises:
            ExportError: it cannot; the message says why.
        """

    @abstractmethod
    def write(
        self, model: ElasticModel, subnet: Subnet, out: Path, *, overwrite: bool = False, verify: bool = True
    ) -> ExportReport | GgufReport:
        """Write the sub-network, load it in the engine, and compare the results."""

    def can_state(self, model: ElasticModel, subnet: Subnet) -> bool:
        """Return whether the engine can run these widths and none of them is 0."""
        try:
            self.check_states(model, subnet)
        except ExportError:
            return False
        return not any(0 in subnet[axis] for axis in AXES)


@dataclass(frozen=True)
class HfExporter(Exporter):
    """Writes a checkpoint for transformers."""

    remote_code: bool = False

    @property
    def table_engine(self) -> Mapping[str, str]:
        """No options: latency tables measured in this process apply."""
        return {}

    def check_free(self, out: Path, *, overwrite: bool) -> None:
        """Check that `out` is free or an older export; an elastic checkpoint is never replaced."""
        check_not_elastic(out)
        check_new(out, overwrite=overwrite)

    def check_states(self, model: ElasticModel, subnet: Subnet) -> None:
        """Refuse layers with some of the heads if the architecture cannot express them."""
        refuse_odd_heads(model, subnet)

    def write(
        self, model: ElasticModel, subnet: Subnet, out: Path, *, overwrite: bool = False, verify: bool = True
    ) -> ExportReport:
        """Write a folder that AutoModelForCausalLM loads."""
        return export(model, subnet, out, remote_code=self.remote_code, overwrite=overwrite, verify=verify)


@dataclass(frozen=True)
class GgufExporter(Exporter):
    """Writes a GGUF file for llama.cpp."""

    quantize: str = "f16"

    @property
    def table_engine(self) -> Mapping[str, str]:
        """Use tables measured in llama.cpp with weights of this type."""
        return {"engine": LLAMA_CPP, "quantization": self.quantize}

    def check_free(self, out: Path, *, overwrite: bool) -> None:
        """Check that `out` is free or an older GGUF file."""
        check_new_file(out, overwrite=overwrite, magic=MAGIC)

    def check_states(self, model: ElasticModel, subnet: Subnet) -> None:
        """Check that llama.cpp has an architecture for these widths, and that the quantisation fits them."""
        check_states_in_gguf(model, subnet, self.quantize)

    def write(
        self, model: ElasticModel, subnet: Subnet, out: Path, *, overwrite: bool = False, verify: bool = True
    ) -> GgufReport:
        """Write a file that llama.cpp loads."""
        return export_gguf(model, subnet, out, quantize=self.quantize, overwrite=overwrite, verify=verify)


EXPORTERS: dict[str, Callable[[ExportConfig], Exporter]] = {
    "hf": lambda config: HfExporter(config.remote_code),
    "gguf": lambda config: GgufExporter(config.quantize),
}
"""The values of `--to`, each with the function that makes its exporter."""
