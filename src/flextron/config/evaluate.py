"""What `flextron evaluate` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flextron.budget import Budget
from flextron.config.fields import (
    BudgetsArgument,
    Dtype,
    ModelArgument,
    check_at_least,
    check_usage_picture,
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss of sub-networks on a text, in nats per token and bits per byte, or accuracy on tasks; paired.

    Example: flextron evaluate out/smollm2-elastic --subnet full 80% 60% neurons=768 --text book.txt

    Example: flextron evaluate out/smollm2-elastic --budget 0.8x 0.6x --tasks paper --limit 500
    """

    model: ModelArgument
    """Folder of an elastic checkpoint, or any checkpoint, hub id or GGUF file."""
    subnet: tuple[str, ...] = ("full",)
    """Sub-networks: full; a share of the layers' weights such as 60%; equal widths such as neurons=768,kv_groups=2; or a Subnet's JSON file."""
    budget: BudgetsArgument = ()
    per_token: bool = False
    """With --budget, also let every token have widths of its own: a second line for each budget, which holds on average."""
    picture: Path | None = None
    """With --per-token, a file for a picture of the first block at the last budget, coloured by compute: .html, .png, .svg or .pdf."""
    text: str = "sample/validation"
    """Text to measure on: a .jsonl or .txt file, also .xz or .gz, or a sample that comes with flextron."""
    tokens: int = 8192
    """Tokens to measure on."""
    block_tokens: int = 512
    """Tokens of one block; nothing is seen across blocks."""
    json: bool = False
    """Print JSON instead of a table."""
    tasks: tuple[str, ...] = ()
    """Instead of a text's loss, accuracy on these tasks by lm-eval, such as arc_easy hellaswag@0 (no examples); paper: the six of Flextron's tables."""
    limit: int | None = None
    """With --tasks, documents of each at most, a fixed random sample."""
    task_data: Path | None = None
    """With --tasks, the folder of their data (docs/tasks.md); by default $FLEXTRON_TASK_DATA, else the Hugging Face hub."""
    out_dir: Path | None = None
    """With --tasks, a folder for results.json, results.md and results.png; what it has from an earlier run is not computed again."""
    measure: bool = True
    """With --tasks, measure the times that budgets limit, a few seconds each, where the latency table was measured here."""
    any_device: bool = False
    """With --budget, use a latency table of another device or version if there is no other."""
    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's."""
    device: str = "auto"
    """Where to run, such as cpu or cuda:0; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        self._check_tasks()
        check_at_least("block_tokens", self.block_tokens, 2)
        check_at_least("tokens", self.tokens, self.block_tokens)
        if not self.subnet:
            raise ValueError("name at least one sub-network, such as --subnet full.")
        if self.per_token and not self.budget:
            raise ValueError("--per-token needs a budget, such as --budget 0.6x.")
        check_usage_picture(self.picture, per_token=self.per_token)
        for budget in self.budget:
            Budget.parse(budget)

    def _check_tasks(self) -> None:
        if self.limit is not None:
            check_at_least("limit", self.limit, 1)
        if self.tasks and self.picture is not None:
            raise ValueError("--picture is of a text; with --tasks, --out-dir writes a picture.")
        for name in ("limit", "task_data", "out_dir"):
            if getattr(self, name) is not None and not self.tasks:
                raise ValueError(f"--{name.replace('_', '-')} is of --tasks, such as --tasks paper.")
