"""Text as it is written, within a budget.

python examples/stream.py MODEL 0.6x "The capital of France is"

MODEL is a folder with a latency table and a router or sensitivities, such as the OUT/trained of whole_way.py.
"""

import sys

from flextron import ElasticModel, stream

folder, budget, prompt = sys.argv[1:]
model = ElasticModel.from_pretrained(folder, device="auto")
for piece in stream(model, prompt, budget=budget):
    print(piece, end="", flush=True)
print()
