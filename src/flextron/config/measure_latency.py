"""The options of `flextron measure-latency`."""

from __future__ import annotations

from dataclasses import dataclass

from flextron.config.fields import (
    DeviceArgument,
    HeldTypeArgument,
    ModelArgument,
    OptionalPath,
    OptionalText,
    Phase,
    Quantization,
    check_at_least,
)


@dataclass(frozen=True)
class MeasureLatencyConfig:
    """Measure how fast sub-networks run here, so that you can ask for budgets of time.

    This times about 36 sub-networks of all sizes, each between two runs of the full model, fits a latency table to the
    times, and saves the table in MODEL. With --engine llamacpp it exports each sub-network and times it in llama.cpp,
    for the budgets of `flextron export --to gguf`. With --from-csv it reads the times of another engine from a file
    with the columns neurons, kv_groups and ms.

    Example: flextron measure-latency out/smollm2-elastic --phase decode
    """

    model: ModelArgument
    """Folder of an elastic checkpoint (see `flextron rank`) or pack, or smollm2-elastic (trained, comes with flextron)."""
    phase: tuple[Phase, ...] = ("prefill", "decode")
    """What to time. prefill: time to the first token. decode: time per further token."""
    batch: int = 1
    """Number of sequences at once."""
    tokens: int = 512
    """Length of the prompt in tokens. decode times the token that follows this many."""
    rounds: int = 2
    """How often to time each sub-network. Sub-networks whose times differ are timed again."""
    from_csv: OptionalPath = None
    """Read the times from this CSV file and measure nothing. Name one --phase; --batch and --tokens say how it was measured."""
    engine: OptionalText = None
    """llamacpp times sub-networks in llama.cpp. With --from-csv, the engine that was timed, such as vllm-0.11; the default is the file's name."""
    quantize: Quantization = "f16"
    """With --engine llamacpp, the type of the weights in the GGUF files."""
    device_name: OptionalText = None
    """With --from-csv, the device that was timed. On other devices, commands then need --any-device to use the table. The default is a table for every device."""
    dtype: HeldTypeArgument = "auto"
    device: DeviceArgument = "auto"

    def __post_init__(self) -> None:
        check_at_least("batch", self.batch, 1)
        check_at_least("tokens", self.tokens, 1)
        check_at_least("rounds", self.rounds, 1)
        if not self.phase or len(set(self.phase)) < len(self.phase):
            raise ValueError(f"--phase is {' '.join(self.phase) or 'empty'}; name prefill, decode, or both once.")
        if self.from_csv is not None and len(self.phase) != 1:
            raise ValueError("a CSV file holds the times of one phase; say which: --phase prefill or --phase decode.")
        if self.in_llamacpp and self.batch != 1:
            raise ValueError(f"--batch is {self.batch}; --engine llamacpp times one sequence at a time.")
        if not self.in_llamacpp and self.quantize != "f16":
            raise ValueError(f"--quantize {self.quantize} needs --engine llamacpp.")
        if self.from_csv is None and not self.in_llamacpp and (self.engine, self.device_name) != (None, None):
            raise ValueError(
                "--engine and --device-name describe a CSV file; name it with --from-csv, or leave them out."
            )

    @property
    def in_llamacpp(self) -> bool:
        """Whether to time in llama.cpp."""
        return self.engine == "llamacpp" and self.from_csv is None
