"""The options of `flextron evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from flextron.budget import Budget
from flextron.config.fields import (
    AnyDeviceArgument,
    BudgetsArgument,
    DeviceArgument,
    HeldTypeArgument,
    ModelArgument,
    OptionalInt,
    OptionalPath,
    OptionalText,
    SubnetsArgument,
    check_at_least,
    check_usage_picture,
    option,
    unset,
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure the loss of sub-networks on a text, or their accuracy on tasks.

    The loss is in nats per token and bits per byte. All sub-networks read the same text, so differences to the first
    one have small errors. With --tasks, lm-eval measures accuracy instead, and how much of it is kept over chance.

    Example: flextron evaluate out/smollm2-elastic --subnet full 80% 60% neurons=768 --text book.txt

    Example: flextron evaluate out/smollm2-elastic --budget 0.9x 0.8x --tasks paper --limit 500
    """

    model: ModelArgument
    """Folder of an elastic checkpoint or pack, smollm2-elastic (trained, comes with flextron), or any checkpoint, hub id or GGUF file."""
    subnet: SubnetsArgument = ("full",)
    budget: BudgetsArgument = ()
    per_token: bool = False
    """With --budget, also measure per-token routing: each budget gets a second line, in which every token has its own widths and the budget holds on average."""
    picture: OptionalPath = None
    """With --per-token, a file for a picture of the first block at the last budget, where colours show how much each token computed: .html, .png, .svg or .pdf."""
    text: str = "sample/validation"
    """Text to measure on: a .txt file, or a .jsonl file with a "text" field in each line, also as .xz, .gz or .bz2, or a sample that comes with flextron."""
    tokens: int = 8192
    """Number of tokens to measure on."""
    block_tokens: int = 512
    """Tokens in one block. The model sees no other block."""
    original: OptionalText = None
    """Also measure how far predictions on the text are from this model's (KL divergence): the folder, hub id or GGUF file that MODEL was made from. Use text unlike the training text: on text like it, the loss also falls where the model only adapts to that kind of text."""
    json: bool = False
    """Print JSON instead of a table."""
    tasks: Annotated[tuple[str, ...], unset("STR [STR ...]")] = ()
    """Measure accuracy on these tasks of lm-eval instead of the loss on a text. hellaswag@0 gives no examples before a question. paper stands for the six tasks of the Flextron paper. Needs: pip install "flextron[tasks]"."""
    limit: OptionalInt = None
    """With --tasks, use at most this many documents of each task, always the same random sample."""
    task_data: OptionalPath = None
    """With --tasks, the folder of the tasks' data (docs/tasks.md). The default is $FLEXTRON_TASK_DATA, then the Hugging Face hub."""
    out_dir: OptionalPath = None
    """With --tasks, a folder for results.json, results.md and results.png. Results that it holds from an earlier run are not computed again."""
    measure: bool = True
    """With --tasks, measure the times that budgets limit. This takes a few seconds for each, and happens only if the latency table was measured here."""
    any_device: AnyDeviceArgument = False
    dtype: HeldTypeArgument = "auto"
    device: DeviceArgument = "auto"

    def __post_init__(self) -> None:
        self._check_tasks()
        check_at_least("block_tokens", self.block_tokens, 2)
        check_at_least("tokens", self.tokens, self.block_tokens)
        if not self.subnet:
            raise ValueError("--subnet needs at least one sub-network, such as --subnet full.")
        if self.per_token and not self.budget:
            raise ValueError("--per-token needs a budget, such as --budget 0.8x.")
        check_usage_picture(self.picture, per_token=self.per_token)
        for budget in self.budget:
            Budget.parse(budget)

    def _check_tasks(self) -> None:
        if self.limit is not None:
            check_at_least("limit", self.limit, 1)
        if self.tasks and self.picture is not None:
            raise ValueError("--picture draws a text; with --tasks, --out-dir writes a picture.")
        for name in ("limit", "task_data", "out_dir"):
            if getattr(self, name) is not None and not self.tasks:
                raise ValueError(f"{option(name)} needs --tasks, such as --tasks paper.")
