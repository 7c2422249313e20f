"""The whole way in Python, from a checkpoint to a faster one.

python examples/whole_way.py MODEL OUT, where MODEL is a folder or a hub id. Sizes are small, for a first look.
"""

import sys
from pathlib import Path

import flextron

source, out = sys.argv[1], Path(sys.argv[2])
text = "sample/train"  # comes with flextron; a .txt or .jsonl file of yours fits your task better

# Load a model, and sort the neurons and attention heads of each layer: those that matter most come first.
model = flextron.ElasticModel.from_pretrained(source)
blocks = flextron.load_blocks(model.tokenizer, text, tokens=4096)
flextron.rank(model, blocks)
model.save_pretrained(out / "ranked")

# Measure what each layer is worth, on text that the ranking has not seen.
unseen = flextron.load_blocks(model.tokenizer, text, tokens=1024, block_tokens=256, skip_documents=blocks.documents)
flextron.measure_sensitivity(model, unseen).save(out / "ranked")

# Train all sub-networks together: they share one set of weights.
steps, watch = flextron.TextOptions(tokens=8192), flextron.WatchOptions(evaluate_tokens=1024, evaluations=1)
trained = flextron.train(flextron.TrainConfig(str(out / "ranked"), out / "trained", text=steps, watch=watch))

# Measure what sub-networks cost on this machine, and learn which one is best within each budget.
model = flextron.ElasticModel.from_pretrained(trained)
flextron.save_table(trained, flextron.measure_latency(model))
flextron.make_router(model, trained, evaluations=160, tokens=512)

# Ask for 60% of the full model's time per token, let that sub-network write, and keep it as a checkpoint of its own.
answer = flextron.route(model, "0.8x")
print(*answer.costs(), sep="\n")
print(flextron.generate(model, "The capital of France is", subnet=answer.subnet, max_new_tokens=16))
report = flextron.export(model, answer.subnet, out / "small")
print(f"wrote {out / 'small'}: {report.parameters_got:,} parameters")
