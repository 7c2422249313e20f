"""What latency tables and routers are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flextron.budget import Budget
from flextron.config.fields import (
    Dtype,
    ModelArgument,
    NeuronStepArgument,
    Phase,
    Quantization,
    RouteArgument,
    check_at_least,
    check_ending,
)

LEAST_EVALUATIONS = 160
"""What `routers.training` needs to train a router at all (a test compares)."""
LEAST_TOKENS = 6144
"""What `routers.token_making` needs to train a token router at all (a test compares)."""


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


@dataclass(frozen=True)
class TrainRouterConfig:
    """Train the router that chooses the best sub-network for a budget, and keep it beside the checkpoint.

    Measures the loss of a few hundred sub-networks, learns to predict it, and trains the router on the predictions. A
    latency table is measured first if there is none. Ctrl-C loses no measurement: run the same command again.

    Example: flextron train-router out/smollm2-elastic
    """

    model: ModelArgument
    """Folder of an elastic checkpoint (see flextron rank)."""
    phase: Phase = "decode"
    """Whose time the router's budgets are parts of; answers keep to limits of any other kind too."""
    evaluations: int = 256
    """Sub-networks whose loss is measured at most; those of an earlier run count."""
    tokens: int = 1024
    """Tokens that each is measured on; the full model's predictions are kept for them (0.2 MB a token at 49,000 words)."""
    text: str = "sample/train"
    """Text to measure on; documents that the model was ranked on are left out where there are others."""
    lowest: float = 0.45
    """Lowest budget to train for, as a part of the full model's time."""
    seed: int = 0
    """Seed of the sub-networks that are tried, and of the training."""
    per_token: bool = False
    """Train a token router, which gives every token widths of its own, on top of this phase's router; that is trained first where there is none."""
    token_text: str | None = None
    """Text for the token router; by default that of --text."""
    token_tokens: int = 12288
    """Tokens that the token router learns from."""
    any_device: bool = False
    """Use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        check_at_least("evaluations", self.evaluations, LEAST_EVALUATIONS)
        check_at_least("tokens", self.tokens, 256)
        check_at_least("seed", self.seed, 0)
        check_at_least("token_tokens", self.token_tokens, LEAST_TOKENS)
        if not 0 < self.lowest < 1:
            raise ValueError(f"lowest is {self.lowest}; it must lie between 0 and 1, the full model's time.")


@dataclass(frozen=True)
class RouteConfig:
    """Choose the best sub-network within a budget, draw it, and compare its time with what was predicted.

    Example: flextron route out/smollm2-elastic --budget 0.6x --out subnet.json
    """

    model: ModelArgument
    """Folder of an elastic checkpoint."""
    budget: RouteArgument
    neuron_step: NeuronStepArgument = None
    measure: bool = True
    """Measure the times that the budget limits, a few seconds each, where the latency table was measured here."""
    picture: Path | None = None
    """File for a picture of the widths: .png, .svg or .pdf."""
    out: Path | None = None
    """JSON file for the sub-network, for --subnet of other commands."""
    json: bool = False
    """Print JSON instead of text."""
    any_device: bool = False
    """Use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        check_ending("out", self.out, (".json",))
        check_ending("picture", self.picture, (".png", ".svg", ".pdf"))
