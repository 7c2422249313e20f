"""vLLM serves exported sub-networks whose layers differ: the same log-probabilities as transformers, no remote code."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flextron import ElasticModel, Subnet, export
from flextron.demo.quickstart import smollm2_path
from flextron.elastic.checkpoint import quiet_transformers
from flextron.vllm_plugin import register

PROMPTS = ["The capital of France is", "Once upon a time, in a land far away,", "Water boils at"]
NEW, LIKELIEST = 12, 4
SERVE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, new, likeliest = json.loads(sys.argv[1])
    llm = LLM(model=folder, dtype="float32", max_model_len=128, enforce_eager=True)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, logprobs=likeliest))
    found = [
        {
            "prompt": list(output.prompt_token_ids),
            "tokens": list(output.outputs[0].token_ids),
            "likeliest": [{token: top.logprob for token, top in tops.items()} for tops in output.outputs[0].logprobs],
        }
        for output in outputs
    ]
    print("found " + json.dumps(found))
"""


def test_the_entry_point_is_there_and_does_nothing_without_vllm():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    entry = re.search(r'entry-points."vllm.general_plugins"]\nflextron = "(.+):(.+)"', project)
    assert getattr(import_module(entry[1]), entry[2]) is register
    for _ in range(2):
        register()


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM, in an environment of its own")
def test_vllm_gives_the_log_probabilities_of_transformers(tmp_path):
    quiet_transformers()
    elastic = ElasticModel.from_pretrained(smollm2_path(), dtype=torch.float32)
    neurons = [1536, 1280, 1408] * 9 + [0, 1152, 1536]
    export(elastic, Subnet(neurons, [3, 2, 3, 3, 1] * 6), tmp_path / "uneven")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", SERVE, json.dumps([str(tmp_path / "uneven"), PROMPTS, NEW, LIKELIEST])],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    (line,) = (line for line in process.stdout.splitlines() if line.startswith("found "))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "uneven")
    assert type(model).__name__ == "FlextronLlamaForCausalLM"
    for found in json.loads(line.removeprefix("found ")):
        with torch.no_grad():
            logits = model(torch.tensor([found["prompt"] + found["tokens"]])).logits
        expected_TV = logits[0, len(found["prompt"]) - 1 :].log_softmax(-1)
        for log_probabilities, token, likeliest in zip(expected_TV, found["tokens"], found["likeliest"], strict=False):
            assert log_probabilities.argmax() == token
            for other, log_probability in likeliest.items():
                assert log_probabilities[int(other)].item() == pytest.approx(log_probability, abs=1e-3)
