"""What two processes hold while they load a model and train it, against the dry run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_worker import KINDS
from training_worker import make_text
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from flextron.model import ElasticModel

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of 80 M weights in layers, so that they outweigh the rest."""
    folder = tmp_path_factory.mktemp("memory")
    config = LlamaConfig(
        vocab_size=300, hidden_size=768, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=128, dtype=torch.bfloat16,
    )  # fmt: skip
    ElasticModel(LlamaForCausalLM(config).to(torch.bfloat16), tiny.tokenizer()).save_pretrained(folder / "model")
    make_text(folder / "text.jsonl")
    return folder


def measured(folder: Path, kind: str, whole: str = "shards") -> dict:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is free is not held
    environment |= {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # with AMX, oneDNN holds repacked weights too: a sixth more in bf16
    worker = [TESTS / "memory_worker.py", folder, kind, whole]
    subprocess.run([*launch, *worker], check=True, env=environment, timeout=240)
    found = [json.loads((folder / f"{kind} {whole} {rank}.json").read_text()) for rank in range(2)]
    return max(found, key=lambda each: each["loading"])


@pytest.mark.parametrize("kind", KINDS)
def test_dry_run_tells_what_a_step_holds(folder, kind):
    found = measured(folder, kind)
    print(found)
    assert found["step"] == pytest.approx(found["expected"], rel=0.1)


def test_loading_in_shards_takes_much_less_than_loading_whole(folder):
    shards, whole = (measured(folder, "all weights", how)["loading"] for how in ("shards", "whole"))
    print(shards, whole)
    assert shards < 0.65 * whole
