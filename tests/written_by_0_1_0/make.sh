#!/usr/bin/env bash
# Makes what lies beside this file: an elastic checkpoint with all that flextron keeps in its folder, and a training run that
# was stopped. Run at commit 9899719, before the source moved into folders; later versions must read it
# (tests/test_written_before.py). Making it anew with a later version would test nothing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
python - "$work" <<'PY'
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import torch
import tiny
from flextron.elastic import ElasticModel
work = Path(sys.argv[1])
tiny.HIDDEN = 16
lm = tiny.plain_model(
    "llama", vocab_size=300, hidden_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, num_hidden_layers=12, max_position_embeddings=1024,
)
ElasticModel(lm.to(torch.bfloat16), tiny.tokenizer()).save_pretrained(work / "plain")
(work / "text.txt").write_text(tiny.TEXT * 60)
PY
cd "$work"
flextron rank plain elastic --text text.txt --tokens 1024 --sensitivity-tokens 256
flextron measure-latency elastic --tokens 16 --rounds 1
python - <<'PY'  # a tiny random model has little to learn: take its router whatever it is worth
from flextron.elastic import ElasticModel
from flextron.routers import training
from flextron.routers.making import make_router
from flextron.routers.token_making import make_token_router
training.LOWEST_RANK, training.LARGEST_ERROR = -1, 100
model = ElasticModel.from_pretrained("elastic")
make_router(model, "elastic", evaluations=160, tokens=512, text="text.txt", any_device=True)
make_token_router(model, "elastic", tokens=6144, text="sample/validation", any_device=True)
PY
flextron route elastic --budget tpot=0.8x --no-measure --out subnet.json --any-device
timeout --signal INT 45 flextron train elastic run --data text.txt --tokens 1048576 --block-tokens 32 --lora-rank 1 \
    --evaluate-tokens 0 --visits-per-step 1 --save-minutes 60 || true
rm -rf "$here"/{elastic,run,subnet.json,text.txt,expected.json}
python - <<'PY'  # what they give, to compare with
import json
import torch
from flextron import ElasticModel, route
from flextron.subnet import Subnet
model = ElasticModel.from_pretrained("elastic", dtype="float32")
tokens = torch.arange(1, 17)[None]
expected = {}
for budget in ("tpot=0.8x", "tpot=0.6x", "80k"):
    subnet = route(model, budget, any_device=True).subnet
    with model.use(subnet):
        expected[budget] = {"subnet": json.loads(subnet.to_json()), "logits": model(tokens).logits[0, -1, :8].tolist()}
with open("expected.json", "w") as file:
    json.dump(expected, file, indent=1)
PY
cp -r elastic run subnet.json text.txt expected.json "$here"
