"""What `flextron measure-latency` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flextron.config.fields import (
    Dtype,
    ModelArgument,
    Phase,
    Quantization,
    check_at_least,
)


@dataclass(frozen=True)
class MeasureLatencyConfig:
    """Measure what sub-networks take here, and keep it beside the checkpoint, so that budgets of time can be asked for.

    Some 36 sub-networks of all sizes are timed in turn, each between two runs of the full model, and a table is fitted
    to them. With --engine llamacpp each is exported and timed in llama.cpp, for the budgets of `flextron export --to gguf`.
    Times that another engine was measured at are read from a CSV file with the columns neurons, kv_groups
    and ms.

    Example: flextron measure-latency out/smollm2-elastic --phase decode
    """

    model: ModelArgument
    """Folder of an elastic checkpoint."""
    phase: tuple[Phase, ...] = ("prefill", "decode")
    """prefill: time to the first token; decode: time of each further one."""
    batch: int = 1
    """Sequences at once."""
    tokens: int = 512
    """Tokens of the prompt (prefill), or before the token that is timed (decode)."""
    rounds: int = 2
    """Timings of each sub-network; sub-networks whose timings differ are timed again."""
    from_csv: Path | None = None
    """Measure nothing, and read the times of one phase from this file; --batch and --tokens say what they were measured at."""
    engine: str | None = None
    """llamacpp: time in llama.cpp. With --from-csv, what was measured, such as vllm-0.11; by default the file's name."""
    quantize: Quantization = "f16"
    """With --engine llamacpp, the type of the weights in the files."""
    device_name: str | None = None
    """With --from-csv, the device that it was measured on. On another one the table then needs --any-device; without a name it serves everywhere."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        check_at_least("batch", self.batch, 1)
        check_at_least("tokens", self.tokens, 1)
        check_at_least("rounds", self.rounds, 1)
        if not self.phase or len(set(self.phase)) < len(self.phase):
            raise ValueError(f"phase is {list(self.phase)}; name prefill, decode, or both once.")
        if self.from_csv is not None and len(self.phase) != 1:
            raise ValueError("a CSV file holds the times of one phase; say which: --phase prefill or --phase decode.")
        if self.in_llamacpp and self.batch != 1:
            raise ValueError(f"batch is {self.batch}; in llama.cpp one sequence is timed at a time.")
        if not self.in_llamacpp and self.quantize != "f16":
            raise ValueError(f"quantize is {self.quantize}; it is of --engine llamacpp.")
        if self.from_csv is None and not self.in_llamacpp and (self.engine, self.device_name) != (None, None):
            raise ValueError("engine and device_name describe a CSV file; name it with --from-csv, or leave them out.")

    @property
    def in_llamacpp(self) -> bool:
        """Whether llama.cpp is what is timed."""
        return self.engine == "llamacpp" and self.from_csv is None
