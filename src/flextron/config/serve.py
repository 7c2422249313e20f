"""The options of `flextron serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from flextron.budget import Budget
from flextron.config.fields import (
    AnyDeviceArgument,
    DeviceArgument,
    HeldTypeArgument,
    ModelArgument,
    OptionalText,
    check_at_least,
    check_between,
    unset,
)

OptionalFloat = Annotated[float | None, unset("FLOAT")]


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model over OpenAI's API. Every request names its own budget; all share one model and one batch.

    A request names its budget as "budget": "0.6x" in its body, in its model's name (NAME:0.6x), or in the headers
    x-slo-ttft-ms and x-slo-tpot-ms. A share is kept exactly. A budget of time may be narrowed under load.

    Example: flextron serve out/trained --default-budget 0.8x --slo-tpot-ms 60
    """

    model: ModelArgument
    """Folder of an elastic checkpoint or pack, smollm2-elastic (trained, comes with flextron), or any checkpoint, hub id or GGUF file."""
    host: str = "127.0.0.1"
    """Address to listen at. The default is reached from this machine only; 0.0.0.0 is reached from all."""
    port: int = 8000
    """Port to listen at. 0 takes a free one."""
    api_key: OptionalText = None
    """Key that requests must carry, as Authorization: Bearer KEY. The environment variable FLEXTRON_API_KEY sets it too, without showing it in lists of processes."""
    served_name: OptionalText = None
    """Name of the model in the API. By default the name of its folder."""
    cors: Annotated[tuple[str, ...], arg(metavar="[ORIGIN [ORIGIN ...]]", help_behavior_hint="")] = ()
    """Origins of web pages that may use the server, such as https://chat.example.com, or * for all. By default none."""
    floor: str = "0.5x"
    """The narrowest sub-network to serve. Smaller budgets are refused, and load narrows no request further. Between it and the full model there is a level at every 0.05x. Text below the smallest size that was trained is poor."""
    default_budget: str = "full"
    """Budget of requests that name none: full, a share such as 0.8x, or a time such as tpot=60ms."""
    adaptive: bool = True
    """Narrow requests that name no budget, when load would make a request miss its time: the --slo times, or its own. --no-adaptive keeps them at the default budget."""
    slo_ttft_ms: OptionalFloat = None
    """Time to the first token to aim at, in ms, for requests that name no budget."""
    slo_tpot_ms: OptionalFloat = None
    """Time of each further token to aim at, in ms, for requests that name no budget."""
    max_batch: int = 16
    """Largest number of requests that run together."""
    cache_tokens: int = 16_384
    """Tokens that the KV cache holds, of all requests together. No request may be longer."""
    max_queue: int = 256
    """Largest number of requests that wait. More are refused with 429."""
    max_tokens: int = 4096
    """Largest number of tokens that a request may ask for."""
    max_seconds: float = 600.0
    """Longest time of a request. What it has written by then is its answer."""
    drain_seconds: float = 30.0
    """Time that requests under way get to end after SIGTERM or Ctrl-C. A second signal ends them at once."""
    any_device: AnyDeviceArgument = False
    dtype: HeldTypeArgument = "auto"
    device: DeviceArgument = "auto"

    def __post_init__(self) -> None:
        check_between("port", self.port, 0, 65_535)
        for name in ("max_batch", "max_queue", "max_tokens", "cache_tokens"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("max_seconds", self.max_seconds, 1)
        check_at_least("drain_seconds", self.drain_seconds, 0)
        self._check_budgets()
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("--api-key is empty; leave it out to serve without a key.")
        _check_name(self.served_name)
        _check_origins(self.cors)

    def _check_budgets(self) -> None:
        _check_share("floor", self.floor)
        if self.default_budget != "full":
            limits = Budget.parse(self.default_budget).limits
            timed = any(limit.metric in ("tpot", "ttft") and not limit.relative for limit in limits)
            if timed and (self.slo_ttft_ms is not None or self.slo_tpot_ms is not None):
                raise ValueError("--default-budget names a time, and so do --slo-ttft-ms or --slo-tpot-ms. Keep one.")
        for name in ("slo_ttft_ms", "slo_tpot_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be milliseconds above 0.")


def _check_share(name: str, text: str) -> None:
    """Raise a ValueError unless it is `full` or a share such as 0.5x."""
    if text == "full":
        return
    limits = Budget.parse(text).limits
    if len(limits) > 1 or not limits[0].relative or limits[0].metric != "tpot":
        raise ValueError(f'--{name} is {text}; it must be a share of the full model, such as "0.5x".')


def _check_name(name: str | None) -> None:
    if name is not None and not (name.strip() and name.isprintable() and name.isascii()):
        raise ValueError(f"--served-name is {name!r}; use printable ASCII characters.")


def _check_origins(origins: tuple[str, ...]) -> None:
    for origin in origins:
        scheme, _, host = origin.partition("://")
        if origin != "*" and (scheme not in ("http", "https") or not host or "/" in host):
            raise ValueError(f"--cors is {origin}; write an origin such as https://chat.example.com, or *.")
