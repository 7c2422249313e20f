"""A worker of vLLM's that runs every request at its own level: `--worker-cls flextron.vllm_plugin.worker.LevelWorker`.

A request names its level in `sampling_params.extra_args["flextron"]`, as an index, a name or a share
(`serving.saved.Levels.find`); over HTTP that is `vllm_xargs`. Without one, it runs the full model.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from flextron.elastic.source import RANKING_FILE
from flextron.errors import FlextronError
from flextron.serving.saved import Levels
from flextron.vllm_plugin.masks import LevelMasks
from flextron.vllm_plugin.runners import ARGUMENT, level_runner, level_state

logger = logging.getLogger("vllm.flextron")
LOADER = "flextron"
"""Load format of an elastic checkpoint's folder."""


@register_model_loader(LOADER)
class LevelLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's loader, which takes every safetensors file for weights, without the ranking."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format="safetensors"))

    def _prepare_weights(self, *args: Any, **kwargs: Any) -> Any:
        folder, files, *others = super()._prepare_weights(*args, **kwargs)
        return (folder, [file for file in files if Path(file).name != RANKING_FILE], *others)


def _base() -> type:
    """The worker that vLLM itself would take here."""
    name = "cpu_worker.CPUWorker" if current_platform.is_cpu() else "gpu_worker.Worker"
    return cast(type, resolve_obj_by_qualname(f"vllm.v1.worker.{name}"))


class LevelWorker(_base()):  # type: ignore[misc]
    """vLLM's worker for this platform, with levels."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.flextron_levels = _levels(vllm_config)
        _refuse_untested(vllm_config)
        # vLLM finds compiled graphs again by a hash of its config; those of the plain model have no masks.
        digest = hashlib.sha256(repr(self.flextron_levels).encode()).hexdigest()
        vllm_config.additional_config = {**vllm_config.additional_config, ARGUMENT: digest}
        if vllm_config.load_config.load_format in ("auto", "hf", "safetensors"):
            vllm_config.load_config.load_format = LOADER
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, **kwargs: Any) -> None:
        """Load the weights, then mask the closing projections."""
        super().load_model(**kwargs)
        runner: Any = self.model_runner
        config = self.vllm_config
        masks = LevelMasks(self.flextron_levels, config.scheduler_config.max_num_batched_tokens, self.device)
        text_config = config.model_config.hf_text_config
        held = range(*config.model_config.get_layers_start_end_indices(config.parallel_config))
        masks.install(runner.get_model(), text_config.model_type, layers=held)
        if self.use_v2_model_runner:
            state = runner.model_state
            state_kind: Any = type(state)
            state.__class__ = level_state(state_kind)
            state.flextron_masks, state.flextron_levels = masks, {}
        else:
            runner_kind: Any = type(runner)
            runner.__class__ = level_runner(runner_kind)
            runner.flextron_masks = masks
        logger.info("Serving the levels %s.", ", ".join(masks.levels.names))


def _levels(vllm_config: Any) -> Levels:
    levels = Levels.load(vllm_config.model_config.model)
    if vllm_config.cache_config.enable_prefix_caching:
        logger.info(
            "Prefix caching is on: each level needs a cache_salt of its own, or requests read each other's keys and "
            "values. flextron.vllm_plugin.middleware.LevelMiddleware gives it (docs/serving-vllm.md)."
        )
    return levels


def _refuse_untested(vllm_config: Any) -> None:
    """Refuse what splits or replaces the modules that are masked.

    Raises:
        FlextronError: one of these is on.
    """
    parallel = vllm_config.parallel_config
    problems = {
        "LoRA": vllm_config.lora_config is not None,
        "quantisation": vllm_config.model_config.quantization is not None,
        "dual batch overlap (--enable-dbo)": bool(getattr(parallel, "use_ubatching", False)),
        "sequence parallelism": bool(getattr(vllm_config.compilation_config.pass_config, "enable_sp", False)),
    }
    found = [name for name, on in problems.items() if on]
    if found:
        raise FlextronError(f"levels do not go together with {' and '.join(found)}. Switch it off.")
