"""What vLLM calls when it starts (entry point `vllm.general_plugins`): exported sub-networks of unequal layers.

vLLM's Transformers backend runs them: the classes of `per_layer`, with vLLM's own attention kernels and KV cache.
"""

from __future__ import annotations

from flextron.elastic import per_layer

BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Make transformers and vLLM know the per-layer architectures; without vLLM, transformers alone."""
    per_layer.register()
    try:
        from vllm import ModelRegistry
    except ImportError:
        return
    known = ModelRegistry.get_supported_archs()
    for classes in per_layer.CLASSES.values():
        if classes.causal_lm.__name__ not in known:
            ModelRegistry.register_model(classes.causal_lm.__name__, BACKEND)
