"""The examples run as they are written, on a tiny checkpoint and on the real one."""

import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import tiny
from flextron.demo.quickstart import smollm2_path
from flextron.model import ElasticModel
from flextron.routers.static import learning, surrogate

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example with arguments; returns what it prints."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_whole_way(run, tmp_path, monkeypatch):
    monkeypatch.setattr(surrogate, "STEPS", 20)  # of so small a model there is little to learn
    monkeypatch.setattr(learning, "STEPS", 5)
    monkeypatch.setattr(learning, "optimise", partial(learning.optimise, steps=5))
    monkeypatch.setattr(learning, "LARGEST_ERROR", 10.0)
    monkeypatch.setattr(learning, "_orders", lambda _: True)
    lm = tiny.plain_model("llama", vocab_size=300, num_hidden_layers=12, max_position_embeddings=1024)
    ElasticModel(lm, tiny.tokenizer()).save_pretrained(tmp_path / "plain")
    assert goes_the_whole_way(run, tmp_path / "plain", tmp_path / "out") < lm.num_parameters()


@pytest.mark.real
@pytest.mark.slow
def test_the_whole_way_of_a_real_model(run, tmp_path):
    assert goes_the_whole_way(run, smollm2_path(), tmp_path / "out") < 130e6


def goes_the_whole_way(run, source, out) -> int:
    """Parameters of the sub-network that comes out."""
    told = run("whole_way.py", source, out)
    small = AutoModelForCausalLM.from_pretrained(out / "small")
    assert told.splitlines()[-1] == f"wrote {out / 'small'}: {small.num_parameters():,} parameters"
    assert "0.8x: " in told
    written = told.partition("the limit is ")[2].partition("\n")[2].rpartition("\nwrote")[0]
    text = run("stream.py", out / "trained", "0.8x", "The capital of France is")
    assert text.startswith(written.rstrip("\n\ufffd"))  # the same sub-network, more tokens
    return small.num_parameters()


def test_the_whole_way_is_short():
    assert len((EXAMPLES / "whole_way.py").read_text().splitlines()) < 40
