"""What the tests of the serving engine share: an engine of a tiny model, and what it should say."""

from collections import defaultdict
from threading import Condition

import torch

from flextron.model import ElasticModel
from flextron.serving.embedded.running import EmbeddedEngine, EngineOptions
from flextron.serving.engine import End, Level, Request, Sampling, Token
from flextron.subnet import Subnet

GREEDY = Sampling(temperature=0)


def nested(model: ElasticModel) -> list[Subnet]:
    """Four nested sub-networks, uneven from layer to layer, with skipped sub-layers in the smallest."""
    space = model.search_space
    full, groups = space.neurons[-1], space.kv_groups[-1]
    low, middle = space.neurons[len(space.neurons) // 3], space.neurons[len(space.neurons) // 2]
    return [
        Subnet((low, 0, low), (1, groups - 1, 0)),
        Subnet((low, low, middle), (1, groups, 1)),
        Subnet((full, middle, middle), (groups - 1, groups, 1)),
        space.full,
    ]


def levels_of(model: ElasticModel) -> list[Level]:
    names = ("0.5x", "0.6x", "0.8x", "full")
    return [
        Level(name, model.share(subnet), subnet, None, None, None)
        for name, subnet in zip(names, nested(model), strict=True)
    ]


class Answers:
    """Handlers that keep what each request got, and wait for the ends."""

    def __init__(self):
        self.tokens = defaultdict(list)
        self.ends: dict[str, End] = {}
        self._changed = Condition()

    def handler(self, request_id: str):
        def take(event):
            with self._changed:
                if isinstance(event, Token):
                    self.tokens[request_id].append(event)
                else:
                    assert request_id not in self.ends, "more than one end"
                    self.ends[request_id] = event
                self._changed.notify_all()

        return take

    def wait(self, *request_ids: str, seconds: float = 60) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: all(name in self.ends for name in request_ids), seconds)
        assert done, f"no end of {set(request_ids) - set(self.ends)}"

    def wait_for_tokens(self, request_id: str, count: int, seconds: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.tokens[request_id]) >= count, seconds)

    def ids(self, request_id: str) -> list[int]:
        return [token.id for token in self.tokens[request_id]]


def make(model: ElasticModel, **options) -> EmbeddedEngine:
    return EmbeddedEngine(model, levels_of(model), EngineOptions(**{"cache_tokens": 1024, "max_rows": 4, **options}))


def request(name: str, prompt, level: int, *, new: int = 8, floor: int | None = None, **more) -> Request:
    options = {"sampling": GREEDY, **more}
    return Request(name, tuple(prompt), new, level, level if floor is None else floor, **options)


@torch.no_grad()
def alone(model: ElasticModel, prompt, subnet: Subnet, new: int) -> list[int]:
    """The greedy text of one sub-network, by plain forward passes over the whole text."""
    tokens = list(prompt)
    with model.use(subnet):
        for _ in range(new):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
