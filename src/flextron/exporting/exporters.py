"""One object for each engine that a sub-network can be exported to: a new engine is a class and an entry here."""

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
    """What an engine can hold, and how a sub-network is written for it."""

    @property
    @abstractmethod
    def table_engine(self) -> Mapping[str, str]:
        """Options with which `flextron.route` takes the latency tables that were measured in this engine."""

    @abstractmethod
    def check_free(self, out: Path, *, overwrite: bool) -> None:
        """Pass if `out` is free for an export; call it before a model is loaded.

        Raises:
            CheckpointError: something is there already, and `overwrite` is false or it is of another kind.
        """

    @abstractmethod
    def check_states(self, model: ElasticModel, subnet: Subnet) -> None:
        """Pass if the engine has a place for these widths.

        Raises:
            ExportError: it has none; the message says why.
        """

    @abstractmethod
    def write(
        self, model: ElasticModel, subnet: Subnet, out: Path, *, overwrite: bool = False, verify: bool = True
    ) -> ExportReport | GgufReport:
        """Write the sub-network, load it where it is to run, and compare."""

    def can_state(self, model: ElasticModel, subnet: Subnet) -> bool:
        """Whether the engine has a place for these widths, none of them 0."""
        try:
            self.check_states(model, subnet)
        except ExportError:
            return False
        return not any(0 in subnet[axis] for axis in AXES)


@dataclass(frozen=True)
class HfExporter(Exporter):
    """A checkpoint for transformers."""

    remote_code: bool = False

    @property
    def table_engine(self) -> Mapping[str, str]:
        """None: times of this process stand for it."""
        return {}

    def check_free(self, out: Path, *, overwrite: bool) -> None:
        """Free, or an older export; never an elastic checkpoint."""
        check_not_elastic(out)
        check_new(out, overwrite=overwrite)

    def check_states(self, model: ElasticModel, subnet: Subnet) -> None:
        """Pass unless a layer keeps some heads of an architecture that cannot state them."""
        refuse_odd_heads(model, subnet)

    def write(
        self, model: ElasticModel, subnet: Subnet, out: Path, *, overwrite: bool = False, verify: bool = True
    ) -> ExportReport:
        """A folder that AutoModelForCausalLM loads."""
        return export(model, subnet, out, remote_code=self.remote_code, overwrite=overwrite, verify=verify)


@dataclass(frozen=True)
class GgufExporter(Exporter):
    """One file for llama.cpp."""

    quantize: str = "f16"

    @property
    def table_engine(self) -> Mapping[str, str]:
        """Tables of llama.cpp, with weights of this type."""
        return {"engine": LLAMA_CPP, "quantization": self.quantize}

    def check_free(self, out: Path, *, overwrite: bool) -> None:
        """Free, or an older GGUF file."""
        check_new_file(out, overwrite=overwrite, magic=MAGIC)

    def check_states(self, model: ElasticModel, subnet: Subnet) -> None:
        """Pass if llama.cpp has an architecture of these widths, and the quantisation fits them."""
        check_states_in_gguf(model, subnet, self.quantize)

    def write(
        self, model: ElasticModel, subnet: Subnet, out: Path, *, overwrite: bool = False, verify: bool = True
    ) -> GgufReport:
        """One file that llama.cpp loads."""
        return export_gguf(model, subnet, out, quantize=self.quantize, overwrite=overwrite, verify=verify)


EXPORTERS: dict[str, Callable[[ExportConfig], Exporter]] = {
    "hf": lambda config: HfExporter(config.remote_code),
    "gguf": lambda config: GgufExporter(config.quantize),
}
"""What `--to` names."""
