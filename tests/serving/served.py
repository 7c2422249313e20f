"""A tiny model behind the real engine and a real HTTP server, for tests."""

import copy
import http.client
import json
import socket
from contextlib import contextmanager

from openai import OpenAI

import tiny
from flextron.model import ElasticModel
from flextron.serving.api.address import address_of, bind
from flextron.serving.api.app import make_app
from flextron.serving.api.options import Access, Options
from flextron.serving.api.server import HttpThread
from flextron.serving.api.service import Service
from flextron.serving.embedded.running import make_engine
from flextron.serving.engine import Level
from flextron.subnet import Subnet

SHARES = {"0.4x": 0.4, "0.6x": 0.6, "0.8x": 0.8, "full": 1.0}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' and loop.first %}"
    "{{ raise_exception('the first message must not be the assistant\\'s') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:{{ ' /think' if think is defined and think }}"
)
HELLO = [{"role": "user", "content": "The quick"}]
GREEDY_BODY = {"messages": HELLO, "temperature": 0, "max_tokens": 12}


def make_model(**changes) -> ElasticModel:
    sizes = {"vocab_size": 300, "max_position_embeddings": 2048, **changes}
    return ElasticModel(tiny.plain_model("llama", **sizes), make_tokenizer())


def make_tokenizer():
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_levels(model, *, timed=True) -> list[Level]:
    """Nested sub-networks with made-up shares: 10 ms a token and 2 ms for each token of a prompt at full width."""
    space, levels = model.search_space, []
    for name, share in SHARES.items():
        width = max(width for width in space.neurons if width <= share * space.neurons[-1])
        subnet = Subnet((width,) * space.layers, (space.kv_groups[-1],) * space.layers)
        times = (10 * share, 2 * share) if timed else (None, None)
        levels.append(Level(name, share, subnet, 4.0 - share, *times))
    return levels


@contextmanager
def engine_of(model, *, timed=True, **options):
    engine = make_engine(model, make_levels(model, timed=timed), **{"cache_tokens": 4096, **options})
    engine.start()
    engine.levels = tuple(make_levels(model, timed=timed))  # known times instead of this machine's
    try:
        yield engine
    finally:
        engine.stop()


def options_for(model, **changes) -> Options:
    facts = {"name": "tiny", "stop_tokens": frozenset({model.tokenizer.eos_token_id}), "vocabulary": 300}
    return Options(**{**facts, **changes})


class Served:
    """A server that answers, and ways to ask it."""

    def __init__(self, url, service, app):
        self.url, self.service, self.app = url, service, app
        self.host = url.removeprefix("http://")

    def client(self, **options) -> OpenAI:
        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60, **options})

    def ask(self, method, path, body=None, **headers):
        """Status, headers and body, read as JSON where it is."""
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            given = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            kind = {} if body is None else {"content-type": "application/json"}
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, given, {**kind, **names})
            answer = connection.getresponse()
            read = answer.read()
            is_json = answer.headers.get("content-type", "").startswith("application/json")
            return answer.status, dict(answer.headers), json.loads(read) if is_json else read
        finally:
            connection.close()

    def post(self, body, path="/v1/chat/completions", **headers):
        return self.ask("POST", path, body, **headers)


@contextmanager
def serving(engine, options, access=None, *, send_buffer=None):
    service = Service(engine, make_tokenizer(), options)
    app = make_app(service, access or Access())
    listening = bind("127.0.0.1", 0)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # of its connections, too
    with HttpThread(app, listening):
        yield Served(address_of(listening), service, app)
    service.close()
