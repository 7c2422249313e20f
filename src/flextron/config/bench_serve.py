"""The options of `flextron bench-serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from flextron.config.fields import OptionalPath, OptionalText, check_at_least, unset

_OptionalFloat = Annotated[float | None, unset("FLOAT")]


@dataclass(frozen=True)
class BenchServeConfig:
    """Send requests to a running server as a trace says, and print what its users would see.

    The default trace is a calm, a burst and a calm. It works with any server that speaks OpenAI's API: flextron serve,
    llama-server, vLLM.

    Example: flextron bench-serve http://127.0.0.1:8000 --rates 0.5 1.5 0.5 --ttft-ms 1500 --tpot-ms 150 --send-objectives
    """

    url: Annotated[Positional[str], arg(metavar="URL")]
    """Address of the server, such as http://127.0.0.1:8000."""
    served_name: OptionalText = None
    """Name of the model to ask for. The default is the first one that the server lists."""
    budget: OptionalText = None
    """Budget of requests that name none in the trace, such as 0.6x. The default leaves it to the server."""
    trace: OptionalPath = None
    """File with a request a line, as JSON: {"at": SECONDS, "prompt": TEXT, "max_tokens": INT, "budget": TEXT}. The default makes up a trace by the next five options."""
    rates: Annotated[tuple[float, ...], arg(metavar="FLOAT [FLOAT ...]")] = (0.5, 1.5, 0.5)
    """Requests a second in each part of the trace."""
    seconds: Annotated[tuple[float, ...], arg(metavar="FLOAT [FLOAT ...]")] = (20.0, 20.0, 20.0)
    """Length of each part."""
    prompt_tokens: int = 48
    """Words in a prompt, about as many tokens. Prompts are taken from the sample text that comes with flextron."""
    new_tokens: Annotated[tuple[int, int], arg(metavar="INT INT")] = (16, 48)
    """Lowest and highest number of tokens in an answer."""
    seed: int = 0
    """Seed for arrivals and lengths."""
    ttft_ms: _OptionalFloat = None
    """Objective for the time to the first token."""
    tpot_ms: _OptionalFloat = None
    """Objective for the time of each further token, on average."""
    send_objectives: bool = False
    """Tell the server the objectives, so that flextron serve may narrow the model to keep them."""
    api_key: OptionalText = None
    """Key of the server."""
    out: OptionalPath = None
    """JSON file for the summary and every request."""

    def __post_init__(self) -> None:
        check_at_least("prompt_tokens", self.prompt_tokens, 1)
        check_at_least("new_tokens", min(self.new_tokens), 1)
        if self.new_tokens[0] > self.new_tokens[1]:
            raise ValueError(f"--new-tokens are {self.new_tokens[0]} {self.new_tokens[1]}; write the lower one first.")
        if len(self.rates) != len(self.seconds):
            raise ValueError(f"--rates has {len(self.rates)} parts and --seconds {len(self.seconds)}; give as many.")
        for name, values in (("rates", self.rates), ("seconds", self.seconds)):
            if not all(0 < value < 1e6 for value in values):
                raise ValueError(f"--{name} are {' '.join(f'{v:g}' for v in values)}; each must be above 0.")
        for name, value in (("ttft_ms", self.ttft_ms), ("tpot_ms", self.tpot_ms)):
            if value is not None:
                check_at_least(name, value, 0)
        if self.send_objectives and self.ttft_ms is None and self.tpot_ms is None:
            raise ValueError("--send-objectives needs --ttft-ms or --tpot-ms.")
