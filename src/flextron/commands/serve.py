"""`flextron serve`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flextron.budget import Budget
from flextron.commands import shared
from flextron.config import ServeConfig
from flextron.errors import FlextronError

if TYPE_CHECKING:
    from flextron.model import ElasticModel
    from flextron.serving.api.options import Access, Options
    from flextron.serving.api.service import Service
    from flextron.serving.api.wishes import Wish
    from flextron.serving.engine import Level, Sampling

KEY = "FLEXTRON_API_KEY"
STEPS = 20
"""Levels of a server whose floor is next to nothing."""
EXAMPLE = 0.8
"""Share of the level in the example of a request."""
TRAINED = 0.5
"""Share of the layers' weights that training covers by default, at least (`flextron train --smallest`)."""


def run(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    _check_installed()
    from flextron.serving.api.address import address_of, bind

    with bind(config.host, config.port) as listening:  # before torch is imported and the model loaded
        from flextron.serving.api.server import serve

        address, access = address_of(listening), _access(config)
        serve(
            lambda: load_service(config),
            listening,
            access,
            drain_seconds=config.drain_seconds,
            ready=lambda service: print(ready_text(service, address, keyed=access.api_key is not None), flush=True),
        )


def _access(config: ServeConfig) -> Access:
    from flextron.serving.api.address import is_loopback
    from flextron.serving.api.options import Access

    key = config.api_key or os.environ.get(KEY) or None
    local = is_loopback(config.host)
    if not local and key is None:
        shared.note(f"{config.host} is reached from other machines, and no --api-key is set: all of them may use it.")
    return Access(key, config.cors, only_local_names=local)


def _check_installed() -> None:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise FlextronError(f'serving needs {error.name}; install "flextron[serve]".') from None


def load_service(config: ServeConfig) -> Service:
    """Load the model and start its engine.

    Raises:
        FlextronError: the model has no tokenizer, or a default cannot be kept.
    """
    from flextron.data.blocks import require_tokenizer
    from flextron.serving.api.service import Service
    from flextron.serving.embedded.running import make_engine
    from flextron.serving.levels import make_levels

    model = shared.load(config)
    tokenizer = require_tokenizer(model.tokenizer)
    levels = make_levels(model, shares=shares_from(config.floor), any_device=config.any_device, warn=shared.note)
    if text := hardly_trained(model, levels.levels):
        shared.note(text)
    size = {"max_rows": config.max_batch, "cache_tokens": config.cache_tokens, "max_waiting": config.max_queue}
    engine = make_engine(model, levels, **size)
    shared.note("timing a few batches, to predict how long steps take")
    engine.start()
    try:
        return Service(engine, tokenizer, options_of(model, engine.levels, levels.losses, config))
    except BaseException:
        engine.stop()
        raise


def hardly_trained(model: ElasticModel, levels: Sequence[Level]) -> str | None:
    """Return a line about levels smaller than what training covers; None if there are none."""
    small = [level for level in levels if model.share(level.subnet) < TRAINED]
    if not small:
        return None
    names = f"{small[0].name} keeps" if len(small) == 1 else f"{small[0].name} to {small[-1].name} keep"
    found = [f"{model.share(level.subnet):.0%}" for level in (small[0], small[-1])[: len(small)]]
    kept = " to ".join(dict.fromkeys(found))
    way_out = f" --floor {levels[len(small)].name} leaves them out." if len(small) < len(levels) else ""
    return (
        f"{names} {kept} of the layers' weights. By default training covers sizes down to {TRAINED:.0%}; text of "
        f"smaller ones is poor.{way_out}"
    )


def shares_from(floor: str) -> list[float]:
    """Return the shares of the levels: the floor, and every multiple of 0.05 above it."""
    least = 1.0 if floor == "full" else Budget.parse(floor).limits[0].value
    return [min(1.0, least), *(step / STEPS for step in range(1, STEPS + 1) if step / STEPS > least)]


def options_of(model: ElasticModel, levels: Sequence[Level], losses: str | None, config: ServeConfig) -> Options:
    """Return what the service needs to know.

    Raises:
        FlextronError: the default budget is below the floor, or a time that the smallest level cannot keep.
    """
    from flextron.serving.api.options import Limits, Options
    from flextron.serving.api.wishes import Asked, Policy, grant

    policy = Policy(_default(config), config.adaptive)
    grant(Asked(), replace(policy, adaptive=True), levels, 1)  # raises where no request could be served
    return Options(
        config.served_name or Path(config.model).name or "flextron",
        _stop_tokens(model),
        getattr(model.config, "vocab_size", None),
        losses,
        _sampling(model),
        policy,
        Limits(new_tokens=config.max_tokens, seconds=config.max_seconds),
    )


def _default(config: ServeConfig) -> Wish:
    from flextron.serving.api.wishes import parse_wish

    wish = parse_wish(config.default_budget, "default")
    times = {"ttft": config.slo_ttft_ms, "tpot": config.slo_tpot_ms}
    named = [f"{name}={value:g}ms" for name, value in times.items() if value is not None]
    if not named:
        return wish
    text = ",".join([*([] if wish.text == "full" else [wish.text]), *named])
    return replace(wish, text=text, ttft_ms=config.slo_ttft_ms, tpot_ms=config.slo_tpot_ms)


def _stop_tokens(model: ElasticModel) -> frozenset[int]:
    """Return the tokens that end an answer: the generation config's, and the tokenizer's."""
    named = model.lm.generation_config.eos_token_id
    own = getattr(model.tokenizer, "eos_token_id", None)
    return frozenset(
        token for token in (*(named if isinstance(named, list) else [named]), own) if isinstance(token, int)
    )


def _sampling(model: ElasticModel) -> Sampling:
    """Return how the checkpoint's generation config samples, which requests may change."""
    from flextron.serving.engine import Sampling

    config = model.lm.generation_config
    if not config.do_sample:
        return Sampling()
    values = {name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    return Sampling(**{name: value for name, value in values.items() if value is not None})


def ready_text(service: Service, address: str, *, keyed: bool) -> str:
    """Return what is printed when requests are answered: the levels, the address, and how to ask."""
    levels, name = service.engine.levels, service.options.name
    loss = "loss +" if service.options.losses == "sensitivities" else "loss"
    rows = [f"{'level':>8}  {'cost':>6}  {loss:>6}  {'ms a token':>10}"]
    rows += [_row(level) for level in reversed(levels)]
    if not service.options.policy.adaptive:
        rows.append("requests that name no budget are never narrowed (--no-adaptive).")
    key = f" -H 'Authorization: Bearer ${KEY}'" if keyed else ""
    level = min(levels, key=lambda level: abs(level.share - EXAMPLE))
    body = f'{{"model": "{name}:{level.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    rows.append(f"serving {name} at {address}; the page is at {address}/, try:")
    rows.append(f"curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    return "\n".join(rows)


def _row(level: Level) -> str:
    loss = "-" if level.loss is None else f"{level.loss:.3f}"
    time = "-" if level.step_ms is None else f"{level.step_ms:.1f}"
    return f"{level.name:>8}  {level.share:>5.3f}x  {loss:>6}  {time:>10}"
