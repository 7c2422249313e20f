"""How vLLM's two model runners tell `LevelMasks` the levels of a batch. No vLLM here.

vLLM 0.32 has an older runner, whose `_model_forward` it documents as overridable, and a newer one, which asks a
`ModelState` for the inputs of each step.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from flextron.errors import BudgetError
from flextron.serving.saved import Levels

ARGUMENT = "flextron"
"""The key of a request's level in `extra_args`."""
logger = logging.getLogger("vllm.flextron")


def level_of(levels: Levels, sampling_params: Any) -> int:
    """Return the level that a request names; the full model's where it names none, or an unknown one (logged)."""
    asked = (getattr(sampling_params, "extra_args", None) or {}).get(ARGUMENT)
    if asked is None:
        return len(levels) - 1
    try:
        return levels.find(int(asked) if isinstance(asked, float) and asked.is_integer() else asked)
    except BudgetError as error:  # an exception here would end the whole engine
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
