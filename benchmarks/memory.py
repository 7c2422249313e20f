r"""Peak memory and time of each step on a Llama of random weights, by default of the shape of TinyLlama (1.1 B).

    python benchmarks/memory.py OUT

Each step is a `flextron` command in a process of its own, in fp32. For each it prints the seconds, the seconds of all
processors together, the peak of the resident memory, and the peak of its anonymous part; the rest are pages of files,
which the system can drop. The model is made once in OUT/model, and what a command prints goes to OUT/STEP.log. It
reads /proc, so it needs Linux.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flextron.data.blocks import documents
from flextron.elastic.checkpoint import quiet_transformers
from model import write_results

GB = 1e9
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of the steps."""

    out: tyro.conf.Positional[Path]
    """Folder for the model, the logs and memory.json."""
    steps: tuple[str, ...] = ("rank", "sensitivities", "evaluate", "train")
    """Steps to run in this order: rank (with refit), streamed-rank (the same from the disk), sensitivities,
    measured-sensitivities, evaluate (three sub-networks), train (one step with adapters)."""
    tokens: int = 1024
    """Number of tokens that each step reads; evaluation reads twice as many."""
    layers: int = 22
    hidden: int = 2048
    heads: int = 32
    kv_groups: int = 4
    neurons: int = 5632
    vocabulary: int = 32000


@dataclass
class Peak:
    """What one process took."""

    seconds: float = 0
    cpu_seconds: float = 0
    """Of all threads together; unlike `seconds` it does not grow when other programs run."""
    resident_gb: float = 0
    anonymous_gb: float = 0
    """Without pages of files, which the system can drop."""


def main(settings: Settings) -> None:
    """Make the model if there is none, and run the steps."""
    settings.out.mkdir(parents=True, exist_ok=True)
    if not (settings.out / "model" / "config.json").is_file():
        make(settings)
    peaks: dict[str, Peak] = {}
    for step in settings.steps:
        peaks[step] = run(arguments(step, settings), settings.out / f"{step}.log")
        print(f"{step:<24}{json.dumps(asdict(peaks[step]))}", flush=True)
    sizes = {key: value for key, value in asdict(settings).items() if key != "out"}
    results = {step: asdict(peak) for step, peak in peaks.items()}
    write_results(settings.out / "memory.json", {"settings": sizes, "steps": results})


def make(settings: Settings) -> None:
    """Write the model and a tokenizer made from the sample text."""
    quiet_transformers()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_groups,
        intermediate_size=settings.neurons,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(settings.out / "model")
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(8000, settings.vocabulary), special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(documents("sample/train"), trainer)
    end = {"eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(settings.out / "model")


def arguments(step: str, settings: Settings) -> list[str]:
    """The arguments of `flextron` for a step."""
    model, ranked, tokens = settings.out / "model", settings.out / "ranked", settings.tokens
    narrow = f"neurons={settings.neurons // 2} kv_groups={settings.kv_groups // 2}"
    rank = f"rank {model} {ranked} --dtype float32 --tokens {tokens} --refit-tokens {tokens} --sensitivity-tokens"
    steps = {
        "rank": f"{rank} 0 --overwrite",
        "streamed-rank": f"{rank} 0 --overwrite --stream --device cpu",
        "sensitivities": f"{rank} {tokens}",
        "measured-sensitivities": f"{rank} {tokens} --sensitivities measured",
        "evaluate": f"evaluate {model} --tokens {2 * tokens} --subnet full {narrow}",
        "train": f"train {model} {settings.out}/trained --resume never --precision fp32 --lora-rank 16 "
        f"--tokens {tokens} --block-tokens {tokens // 2} --evaluate-tokens 0",
    }
    return steps[step].split()


def run(arguments: list[str], log: Path) -> Peak:
    """Run one command and watch its memory."""
    peak, start, used = Peak(), time.perf_counter(), _cpu_seconds()
    with log.open("w") as output:
        command = [sys.executable, "-m", "flextron.cli", *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            sizes = {name: int(kb) * 1024 / GB for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.M)}
            peak.resident_gb = max(peak.resident_gb, round(sizes.get("VmHWM", 0), 3))
            peak.anonymous_gb = max(peak.anonymous_gb, round(sizes.get("RssAnon", 0), 3))
            time.sleep(SAMPLE_SECONDS)
    peak.seconds, peak.cpu_seconds = round(time.perf_counter() - start, 1), round(_cpu_seconds() - used, 1)
    if process.returncode:
        raise SystemExit(f"flextron {' '.join(arguments)} failed; {log} tells why.")
    return peak


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
