"""Every recipe is read by the command in its first line, and its dry run fits the machine that it is written for."""

import shlex
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig

from flextron.cli import parse
from flextron.config import COMMANDS
from flextron.training.estimate import GPU_BYTES, TrainEstimate, estimate_training

RECIPES = Path(__file__).parents[1] / "recipes"
SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def parsed(recipe: Path, model: Path):
    """The config that the recipe's first line asks for, with another model."""
    words = shlex.split(recipe.read_text().splitlines()[0].removeprefix("# "))
    given = words[next(place for place, word in enumerate(words) if word in COMMANDS) :]
    assert given[-2:] == ["--recipe", f"recipes/{recipe.name}"]
    return parse([given[0], str(model), *given[2:-1], str(recipe)])


def estimated(name: str, model: Path, *, processes: int = 1, **sizes) -> TrainEstimate:
    LlamaConfig(**sizes).save_pretrained(model)
    start = time.monotonic()
    estimate = estimate_training(parsed(RECIPES / name, model), processes=processes)
    assert time.monotonic() - start < 20
    assert estimate.warnings == []
    print(estimate)
    return estimate


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_first_line_runs_the_recipe(recipe, tmp_path):
    first = recipe.read_text().splitlines()[0]
    assert first.startswith(("# flextron ", "# torchrun --nproc-per-node 8 -m flextron.cli "))
    assert type(parsed(recipe, tmp_path)) is COMMANDS["train"]


def test_recipe_for_a_cpu_takes_minutes_and_little_memory(tmp_path):
    estimate = estimated("smollm2-cpu.yaml", tmp_path, **SMOLLM2)
    assert estimate.parameters == 134_515_008
    assert estimate.steps >= 30
    assert estimate.tokens < 100_000
    assert estimate.total_bytes < 4e9


def test_recipe_for_a_gpu_fits(tmp_path):
    estimate = estimated("smollm2-gpu.yaml", tmp_path, **SMOLLM2)
    assert estimate.steps >= 1000
    assert 5e9 < estimate.total_bytes < 40e9


def test_recipe_for_eight_gpus_fits_seven_billion_weights(tmp_path):
    estimate = estimated("llama-7b-fsdp.yaml", tmp_path, processes=8, max_position_embeddings=4096)
    assert estimate.parameters == pytest.approx(6.74e9, rel=1e-3)
    assert estimate.memory["weights"] == 4 * estimate.parameters // 8
    assert 15e9 < estimate.total_bytes < GPU_BYTES / 2
    assert estimate.loading_bytes == 0


LLAMA_3 = {"vocab_size": 128_256, "max_position_embeddings": 131_072, "num_key_value_heads": 8, "dtype": "bfloat16"}


def test_recipe_for_one_gpu_fits_eight_billion_weights(tmp_path):
    estimate = estimated("llama-8b-adapters.yaml", tmp_path, **LLAMA_3, intermediate_size=14_336)
    assert estimate.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert estimate.memory["teacher"] == 0
    assert 16e9 < estimate.total_bytes < GPU_BYTES / 2


def test_recipe_for_eight_gpus_fits_seventy_billion_weights(tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64}
    estimate = estimated("llama-70b-adapters.yaml", tmp_path, processes=8, **LLAMA_3, **sizes)
    assert estimate.parameters == pytest.approx(70.6e9, rel=1e-3)
    assert estimate.loading_bytes == 0
    assert 18e9 < estimate.total_bytes < GPU_BYTES * 0.6
