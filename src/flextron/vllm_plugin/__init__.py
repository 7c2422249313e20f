"""What vLLM loads of flextron: per-layer exports (entry point `vllm.general_plugins`), and levels of one checkpoint.

- `register`: lets vLLM load exported sub-networks with unequal layers. vLLM's Transformers backend runs the classes of
  `per_layer` with vLLM's own attention kernels and KV cache.
- `worker.LevelWorker` (`--worker-cls`): runs every level of an elastic checkpoint in one batch.
- `middleware.LevelMiddleware` (`--middleware`): lets requests name their levels over HTTP.

docs/serving-vllm.md shows the command.
"""

from __future__ import annotations

from flextron.elastic import per_layer

BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Register the per-layer architectures with transformers, and with vLLM if it is installed."""
    per_layer.register()
    try:
        from vllm import ModelRegistry
    except ImportError:
        return
    known = ModelRegistry.get_supported_archs()
    for name in per_layer.causal_lm_names().values():
        if name not in known:
            ModelRegistry.register_model(name, BACKEND)
