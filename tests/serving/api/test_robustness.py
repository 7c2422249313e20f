"""Clients that are slow, rude or gone; keys and limits. The server answers each, and nothing is left behind."""

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from served import HELLO, engine_of, make_model, options_for, serving
from test_openai import GREEDY, chat, extra, wait_until_idle

from flextron.serving.api.options import Access, Limits

LONG = {**GREEDY, "max_tokens": 1900, "ignore_eos": True}


def send_raw(server, data: bytes, *, read=True) -> bytes:
    """Send bytes as they are, and read until the server closes."""
    host, port = server.host.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(data)
        found = b""
        while read and (piece := connection.recv(65536)):
            found += piece
        return found


def as_http(body: bytes, *headers: str, path="/v1/chat/completions", method="POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, *(headers or ["Content-Type: application/json"]), "", ""]).encode() + body


class TestLeaving:
    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_leaves_frees_the_engine(self, server, shared_engine, stream):
        cancelled = server.service.metrics.cancelled._value.get()
        host, port = server.host.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(as_http(json.dumps({**LONG, "stream": stream, "n": 3}).encode()))
            if stream:
                assert connection.recv(1000)
            until = time.monotonic() + 10
            while shared_engine.stats().running < 3:
                assert time.monotonic() < until
                time.sleep(0.005)
        wait_until_idle(shared_engine, 3)
        assert server.service.metrics.cancelled._value.get() == cancelled + 3
        assert shared_engine.stats().cache_used < 0.5

    def test_a_stream_that_is_closed_early(self, client, shared_engine):
        with chat(client, stream=True, max_tokens=1900, **extra(ignore_eos=True)) as stream:
            for _, _ in zip(range(5), stream, strict=False):
                pass
        wait_until_idle(shared_engine, 3)


class TestMany:
    def test_64_parallel_streams_get_the_texts_that_they_get_alone(self, client, shared_engine):
        budgets = ["0.4x", "0.6x", "0.8x", "full"]
        asked = [{"seed": place % 8, "temperature": 1.0, **extra(budget=budgets[place % 4])} for place in range(64)]

        def text(fields):
            return "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True, **fields))

        with ThreadPoolExecutor(64) as pool:
            texts = list(pool.map(text, asked))
        assert len(texts) == 64
        for place in range(8):
            assert len({*texts[place::8]}) == 1  # the same seed and budget
        assert texts[:4] == [text(fields) for fields in asked[:4]]
        wait_until_idle(shared_engine)

    def test_200_malformed_requests_get_an_answer_each(self, server, client, shared_engine):
        draw = random.Random(0)  # noqa: S311
        good = as_http(json.dumps(GREEDY).encode())

        def broken() -> bytes:
            kind = draw.randrange(8)
            if kind == 0:  # not HTTP
                return draw.randbytes(draw.randrange(1, 300)) + b"\r\n\r\n"
            if kind == 1:  # bytes changed anywhere
                data = bytearray(good)
                for _ in range(3):
                    data[draw.randrange(len(data) - len(json.dumps(GREEDY)))] = draw.randrange(256)
                return bytes(data)
            if kind == 2:
                return as_http(draw.randbytes(100))
            if kind == 3:
                return as_http(b"{}", "Content-Type: text/plain")
            if kind == 4:
                return as_http(b"x" * 10, method=draw.choice(["PUT", "DELETE", "BREW"]))
            if kind == 5:
                return as_http(
                    json.dumps({**GREEDY, draw.choice(list(GREEDY)): draw.choice([[], {}, -1, "☃"])}).encode()
                )
            if kind == 6:
                return as_http(b"", "X: " + "y" * 200_000, path="/health", method="GET")
            return as_http(b'{"messages":' * draw.randrange(1, 2000))

        def ask(data):
            host, port = server.host.split(":")
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                try:
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    return connection.recv(200)
                except OSError:  # it was closed before all was sent
                    return b"HTTP/1.1 4"

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, [broken() for _ in range(200)]))
        bad = [answer for answer in answers if answer and not answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200"))]
        assert not bad
        assert sum(answer.startswith(b"HTTP/1.1 4") for answer in answers) > 100
        assert chat(client).choices[0].message.content
        wait_until_idle(shared_engine)

    def test_a_full_queue_is_said_with_the_time_to_come_back(self):
        with (
            engine_of(make_model(), max_rows=1, max_waiting=1) as engine,
            serving(engine, options_for(engine._model)) as served,
            served.client() as client,
        ):
            with pytest.raises(openai.RateLimitError) as caught:
                chat(client, n=4, max_tokens=1900, **extra(ignore_eos=True))
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert caught.value.code == "queue_full"
            wait_until_idle(engine, 3)
            _, _, text = served.ask("GET", "/metrics")
            assert b'flextron_rejected_total{code="queue_full"} 1.0' in text


class TestSlow:
    def test_a_reader_that_takes_nothing_is_left(self, shared_engine, served_model):
        """Its window is full after some kB; then nothing moves."""
        options = options_for(served_model, limits=Limits(stall_seconds=0.3))
        body = {**LONG, "stream": True, "logprobs": True, "top_logprobs": 20}
        with serving(shared_engine, options, send_buffer=4096) as served:
            host, port = served.host.split(":")
            with socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.settimeout(20)
                connection.connect((host, int(port)))
                connection.sendall(as_http(json.dumps(body).encode()))
                assert connection.recv(100)
                until = time.monotonic() + 15
                while not served.service.metrics.cancelled._value.get():
                    assert time.monotonic() < until, "it was not left"
                    time.sleep(0.05)
        wait_until_idle(shared_engine)

    def test_a_reader_that_is_slow_gets_all(self, server):
        body = json.dumps({**GREEDY, "stream": True, "max_tokens": 60, "ignore_eos": True}).encode()
        host, port = server.host.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(as_http(body))
            found = b""
            while piece := connection.recv(500):
                found += piece
                time.sleep(0.005)
        assert b"data: [DONE]" in found

    def test_a_body_that_does_not_come(self, shared_engine, served_model):
        options = options_for(served_model, limits=Limits(read_seconds=0.2))
        with serving(shared_engine, options) as served:
            data = as_http(b"{}").replace(b"Content-Length: 2", b"Content-Length: 9")
            answer = send_raw(served, data)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"send it faster" in answer


class TestLimits:
    def test_bodies(self, shared_engine, served_model):
        options = options_for(served_model, limits=Limits(body_bytes=1000))
        with serving(shared_engine, options) as served:
            status, _, body = served.post({**GREEDY, "user": "x" * 1000})
            assert (status, body["error"]["code"]) == (413, "body_too_large")
            assert served.post(b"x" * 100_000)[0] in (413, 400)
            assert served.post(GREEDY)[0] == 200

    def test_other_kinds_of_bodies(self, server):
        status, _, body = server.post(GREEDY, content_type="text/plain")
        assert (status, body["error"]["code"]) == (415, "unsupported_media_type")
        assert server.post(GREEDY, content_type="application/json; charset=utf-8")[0] == 200

    def test_prompts(self, shared_engine, served_model):
        options = options_for(served_model, limits=Limits(prompt_tokens=10))
        with serving(shared_engine, options) as served:
            status, _, body = served.post({**GREEDY, "messages": [{"role": "user", "content": "long " * 30}]})
        assert status == 400
        assert "this server reads at most 10. Shorten it." in body["error"]["message"]


class TestKeys:
    @pytest.fixture
    def guarded(self, shared_engine, served_model):
        access = Access("secret ☃", only_local_names=False)
        with serving(shared_engine, options_for(served_model), access) as served:
            yield served

    @pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", "Basic secret", "secret"])
    def test_without_the_key_nothing_is_answered(self, guarded, given):
        headers = {} if given is None else {"authorization": given}
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
            status, _, body = guarded.ask(method, path, GREEDY if method == "POST" else None, **headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")

    def test_what_needs_none(self, guarded):
        for path in ("/", "/health", "/page/page.js"):
            assert guarded.ask("GET", path)[0] == 200

    def test_with_the_key(self, shared_engine, served_model):
        access = Access("secret", only_local_names=False)
        with serving(shared_engine, options_for(served_model), access) as served:
            with served.client(api_key="secret") as client:
                assert chat(client).choices
            with served.client(api_key="secret2") as client, pytest.raises(openai.AuthenticationError):
                chat(client)


class TestPagesElsewhere:
    """What a web page of another origin may do in a user's browser."""

    @pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[x"])
    def test_names_that_lead_here_are_refused(self, server, host):
        assert server.ask("GET", "/v1/models", host=host)[0] in (400, 403)

    @pytest.mark.parametrize("host", ["localhost:9", "127.0.0.1", "[::1]:8000", "a.localhost", "127.8.8.8"])
    def test_names_of_this_machine_pass(self, server, host):
        assert server.ask("GET", "/v1/models", host=host)[0] == 200

    def test_no_origin_is_allowed_by_default(self, server):
        _, headers, _ = server.ask("GET", "/v1/models", origin="https://chat.example")
        assert not [name for name in headers if name.startswith("access-control")]
        preflight = {"origin": "https://chat.example", "access_control_request_method": "POST"}
        assert server.ask("OPTIONS", "/v1/chat/completions", **preflight)[0] == 405

    def test_those_that_are_named_are(self, shared_engine, served_model):
        access = Access("key", cors=("https://chat.example",))
        with serving(shared_engine, options_for(served_model), access) as served:
            asked = {"access_control_request_method": "POST", "access_control_request_headers": "x-slo-tpot-ms"}
            status, headers, _ = served.ask("OPTIONS", "/v1/models", origin="https://chat.example", **asked)
            assert (status, headers["access-control-allow-origin"]) == (200, "https://chat.example")
            assert served.ask("OPTIONS", "/v1/models", origin="https://evil.example", **asked)[0] == 400
            _, headers, _ = served.ask("GET", "/v1/models", origin="https://chat.example")  # an error can be read
            assert headers["access-control-allow-origin"] == "https://chat.example"


def test_nothing_is_left_behind(server, client, shared_engine):
    """Threads, texts and cache are what they were after streams that end in every way."""
    chat(client)
    threads = threading.active_count()
    for place in range(12):
        with chat(client, stream=True, max_tokens=40, messages=[*HELLO, *HELLO]) as stream:
            for _, _ in zip(range(place), stream, strict=False):
                pass
    with pytest.raises(openai.BadRequestError):
        chat(client, **extra(budget="0.1x"))
    wait_until_idle(shared_engine)
    assert threading.active_count() <= threads + 1
    assert replace(shared_engine.stats(), steps=0).running == 0


def test_memory_stays_where_it_was(client, shared_engine):
    """Streams that are left and requests that are refused, hundreds of them, keep none of it."""

    def rude() -> int:
        for place in range(100):
            with chat(client, stream=True, max_tokens=40, messages=[*HELLO, *HELLO]) as stream:
                for _, _ in zip(range(place % 5), stream, strict=False):
                    pass
            with pytest.raises(openai.BadRequestError):
                chat(client, messages=[{"role": "user", "content": "x" * 100_000}])
        wait_until_idle(shared_engine)
        return held_bytes()

    rude()  # caches fill
    before = rude()
    assert rude() < before + 5e6


def held_bytes() -> int:
    """Memory of this process that is its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
