"""A worker of vLLM's that runs every request at its own level: `--worker-cls flextron.vllm_plugin.worker.LevelWorker`.

A request names its level in `sampling_params.extra_args["flextron"]`, as an index, a name or a share
(`serving.saved.Levels.find`); over HTTP that is `vllm_xargs`. Without one, it runs the full model.

vLLM 0.32 has two model runners. The older one is told each batch's levels before the forward pass (`_model_forward`,
which vLLM documents as overridable), the newer one by its `ModelState`.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any, cast

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from flextron.errors import BudgetError, FlextronError
from flextron.serving.saved import FILE, Levels
from flextron.vllm_plugin.masks import LevelMasks

ARGUMENT = "flextron"
"""The key of a request's level in `extra_args`."""
logger = init_logger("vllm.flextron")


def level_of(levels: Levels, sampling_params: Any) -> int:
    """Return the level that a request names; the full model's where it names none, or an unknown one (logged)."""
    asked = (getattr(sampling_params, "extra_args", None) or {}).get(ARGUMENT)
    if asked is None:
        return len(levels) - 1
    try:
        return levels.find(int(asked) if isinstance(asked, float) and asked.is_integer() else asked)
    except (BudgetError, TypeError) as error:  # an exception here would end the whole engine
        logger.error("A request runs the full model, because %s", error)
        return len(levels) - 1


@cache
def level_runner(kind: Any) -> Any:
    """A kind of the older runner that tells `flextron_masks` the levels of a batch before each forward pass."""

    class LevelRunner(kind):  # type: ignore[misc]
        def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
            batch, masks = self.input_batch, self.flextron_masks
            ids = batch.req_ids[: batch.num_reqs]  # complete only now: rows change places while a batch is prepared
            starts = self.query_start_loc.np[: len(ids) + 1]
            levels = [level_of(masks.levels, self.requests[name].sampling_params) for name in ids]
            masks.set(levels, (starts[1:] - starts[:-1]).tolist())
            return super()._model_forward(*args, **kwargs)

    return LevelRunner


@cache
def level_state(kind: Any) -> Any:
    """A kind of the newer runner's `ModelState` that tells `flextron_masks` the levels of a batch."""

    class LevelState(kind):  # type: ignore[misc]
        def add_request(self, req_index: int, new_req_data: Any) -> None:
            self.flextron_levels[req_index] = level_of(self.flextron_masks.levels, new_req_data.sampling_params)
            super().add_request(req_index, new_req_data)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            masks, requests = self.flextron_masks, input_batch.num_reqs
            starts = input_batch.query_start_loc_np[: requests + 1]
            places = input_batch.idx_mapping_np[:requests].tolist()
            levels = [self.flextron_levels.get(place, masks.full) for place in places]
            masks.set(levels, (starts[1:] - starts[:-1]).tolist())
            return super().prepare_inputs(input_batch, req_states)

    return LevelState


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
            state.__class__ = level_state(type(state))
            state.flextron_masks, state.flextron_levels = masks, {}
        else:
            runner.__class__ = level_runner(type(runner))
            runner.flextron_masks = masks
        logger.info("Serving the levels %s.", ", ".join(masks.levels.names))


def _levels(vllm_config: Any) -> Levels:
    levels = Levels.load(vllm_config.model_config.model)
    if vllm_config.cache_config.enable_prefix_caching:
        logger.info(
            "Prefix caching is on: each level needs a cache_salt of its own, or requests read each other's keys and "
            "values. flextron.vllm_plugin.middleware.LevelMiddleware gives it; see %s in docs/serving-vllm.md.",
            FILE,
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
