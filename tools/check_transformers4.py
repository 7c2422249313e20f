"""Whether exports load in transformers 4 with the logits that they have here; by hand, in an environment of its own.

python tools/check_transformers4.py [VERSION]     (4.57.6 by default; makes build/transformers-VERSION, once)

Exports a tiny random model of every family, and Llama with scaled rotary embeddings, and compares logits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402
from flextron import ElasticModel, export  # noqa: E402

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 123456.0},
    "linear": {"rope_type": "linear", "rope_theta": 3e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
IN_THE_OTHER = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, __version__
print("transformers", __version__)
wrong = 0
for folder in sorted(Path(sys.argv[1]).iterdir()):
    expected = torch.tensor(json.loads((folder / "logits.json").read_text()))
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = lm(torch.arange(1, 33)[None], use_cache=False).logits
    off = (logits - expected).abs().max().item() / expected.abs().max().item()
    wrong += off > 1e-4
    print(f"{folder.name:<32}{'differs by' if off > 1e-4 else 'same, within'} {off:.1e} of the largest logit")
raise SystemExit(wrong)
"""


def main(version: str = "4.57.6") -> int:
    """Compare, and return the number of exports that differ."""
    python = _environment(version)
    with TemporaryDirectory() as folder:
        for model_type in tiny.CONFIGS:
            _export(Path(folder) / model_type, tiny.plain_model(model_type))
        for name, rope in ROPES.items():
            _export(Path(folder) / f"llama_rope_{name}", tiny.plain_model("llama", rope_parameters=rope))
        return subprocess.run([python, "-c", IN_THE_OTHER, folder], check=False).returncode


def _export(folder: Path, lm: torch.nn.Module) -> None:
    with torch.no_grad():
        logits = lm(torch.arange(1, 33)[None], use_cache=False).logits
    model = ElasticModel(lm)
    export(model, model.search_space.full, folder)
    (folder / "logits.json").write_text(json.dumps(logits.tolist()))


def _environment(version: str) -> Path:
    folder = ROOT / "build" / f"transformers-{version}"
    if not (folder / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        packages = [f"transformers=={version}", "torch==2.13.0"]
        subprocess.run([folder / "bin/pip", "install", "-q", *packages], check=True)
        (folder / "ready").touch()
    return folder / "bin/python"


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
