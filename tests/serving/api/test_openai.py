"""OpenAI's API over real HTTP, by OpenAI's own client."""

import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from served import GREEDY_BODY, SHARES, engine_of, make_model, make_tokenizer, options_for, serving

from flextron.inference.text import text_pieces

GREEDY = {"model": "tiny", **GREEDY_BODY}
PROMPT = {"model": "tiny", "prompt": "The quick brown", "temperature": 0, "max_tokens": 12}


def chat(client, **changes):
    return client.chat.completions.create(**{**GREEDY, **changes})


def extra(**fields):
    return {"extra_body": fields}


def report(answer):
    return answer.usage.model_extra["flextron"]


class TestChat:
    def test_answers(self, client):
        answer = chat(client)
        choice = answer.choices[0]
        assert answer.object == "chat.completion"
        assert answer.model == "tiny"
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert choice.finish_reason in ("length", "stop")
        usage = answer.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.completion_tokens == 12 or choice.finish_reason == "stop"

    def test_a_stream_holds_the_same_text(self, client):
        whole = chat(client)
        chunks = list(chat(client, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert len({chunk.id for chunk in chunks}) == 1
        assert report(chunks[-1])["levels"] == {"full": whole.usage.completion_tokens}

    def test_a_stream_gives_its_usage_in_a_chunk_of_its_own(self, client):
        *chunks, last = chat(client, stream=True, stream_options={"include_usage": True})
        assert last.choices == []
        assert last.usage.completion_tokens == chat(client).usage.completion_tokens
        assert all(chunk.usage is None for chunk in chunks)
        assert report(last)["met"] == {"ttft": None, "tpot": None}

    def test_a_stream_ends_with_done(self, server):
        status, headers, body = server.post({**GREEDY, "stream": True})
        assert status == 200
        assert headers["content-type"].startswith("text/event-stream")
        assert body.endswith(b"data: [DONE]\n\n")
        for event in body.decode().strip().split("\n\n")[:-1]:
            json.loads(event.removeprefix("data: "))

    def test_parts_of_text_are_joined(self, client):
        parts = [{"type": "text", "text": "The"}, {"type": "text", "text": "quick"}]
        joined = [{"role": "user", "content": "The\nquick"}]
        as_parts = chat(client, messages=[{"role": "user", "content": parts}])
        assert as_parts.choices[0].message.content == chat(client, messages=joined).choices[0].message.content

    def test_the_template_gets_keywords(self, client):
        plain, thinking = chat(client), chat(client, **extra(chat_template_kwargs={"think": True}))
        assert thinking.usage.prompt_tokens > plain.usage.prompt_tokens

    def test_several_texts(self, client):
        answer = chat(client, n=3, temperature=1.0, seed=5)
        texts = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert len(set(texts)) == 3
        again = chat(client, n=3, temperature=1.0, seed=5)
        assert [choice.message.content for choice in again.choices] == texts
        assert answer.usage.prompt_tokens == chat(client).usage.prompt_tokens
        streamed = {0: "", 1: "", 2: ""}
        for chunk in chat(client, n=3, temperature=1.0, seed=5, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        assert list(streamed.values()) == texts

    def test_a_seed_repeats_a_text(self, client):
        first, second, other = (chat(client, temperature=1.0, seed=seed).choices[0] for seed in (7, 7, 8))
        assert first.message.content == second.message.content != other.message.content

    def test_logprobs(self, client):
        answer = chat(client, logprobs=True, top_logprobs=2)
        content = answer.choices[0].logprobs.content
        assert len(content) == answer.usage.completion_tokens
        for token in content:
            assert token.logprob <= 0
            assert token.bytes == list(token.token.encode())
            assert [top.logprob for top in token.top_logprobs] == sorted(
                (top.logprob for top in token.top_logprobs), reverse=True
            )
            assert token.top_logprobs[0].token == token.token  # greedy
            assert len(token.top_logprobs) == 2
        streamed = [
            token
            for chunk in chat(client, logprobs=True, stream=True)
            for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
        ]
        assert [token.token for token in streamed] == [token.token for token in content]
        assert streamed[0].top_logprobs == []

    def test_json_follows_its_schema(self, client):
        schema = {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
        answer = chat(client, response_format=form, max_tokens=200, temperature=1.0, seed=1)
        assert answer.choices[0].finish_reason == "stop"
        assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "blue")

    def test_a_bias_forces_a_token(self, client):
        tokenizer = make_tokenizer()
        token = tokenizer("q").input_ids[0]
        answer = chat(client, logit_bias={str(token): 100}, max_tokens=3)
        assert answer.choices[0].message.content == "qqq"

    def test_a_stop_token_ends_the_text(self, client):
        stop = make_tokenizer().eos_token_id
        answer = chat(client, logit_bias={str(stop): 100})
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")
        on = chat(client, logit_bias={str(stop): 100}, **extra(ignore_eos=True))
        assert on.choices[0].finish_reason == "length"


@pytest.fixture(scope="module")
def text(client):
    return client.completions.create(**{**PROMPT, "max_tokens": 60}).choices[0].text


class TestStop:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("place", [0, 5, 17, 30])
    @pytest.mark.parametrize("size", [1, 4, 9])
    def test_a_string_ends_the_text_and_is_not_shown(self, client, text, place, size, stream):
        stop = text[place : place + size]
        answer = client.completions.create(**{**PROMPT, "max_tokens": 60}, stop=["☃", stop], stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"

    def test_what_only_begins_like_one_is_shown_at_the_end(self, client, text):
        answer = client.completions.create(**{**PROMPT, "max_tokens": 60}, stop=f"{text[-3:]}☃", stream=True)
        assert "".join(chunk.choices[0].text for chunk in answer) == text


class TestCompletions:
    def test_goes_on_from_text_and_from_tokens(self, client):
        text = client.completions.create(**PROMPT)
        ids = make_tokenizer()(PROMPT["prompt"]).input_ids
        tokens = client.completions.create(**{**PROMPT, "prompt": ids})
        assert text.object == "text_completion"
        assert text.choices[0].text == tokens.choices[0].text
        assert text.usage.prompt_tokens == len(ids)

    def test_many_prompts_give_their_texts_in_order(self, client):
        prompts = ["The quick", "Pack my box", "jugs"]
        alone = [client.completions.create(**{**PROMPT, "prompt": prompt}).choices[0].text for prompt in prompts]
        answer = client.completions.create(**{**PROMPT, "prompt": prompts})
        assert [choice.text for choice in answer.choices] == alone
        twice = client.completions.create(**{**PROMPT, "prompt": prompts, "n": 2})
        assert [choice.text for choice in twice.choices] == [text for text in alone for _ in range(2)]

    def test_logprobs(self, client):
        answer = client.completions.create(**PROMPT, logprobs=3)
        found = answer.choices[0].logprobs
        assert len(found.tokens) == len(found.token_logprobs) == answer.usage.completion_tokens
        assert all(1 <= len(top) <= 3 for top in found.top_logprobs)  # two tokens may have one text
        assert found.text_offset[0] == 0
        assert found.text_offset == sorted(found.text_offset)

    def test_sixteen_tokens_by_default(self, client):
        answer = client.completions.create(model="tiny", prompt="The", temperature=0, **extra(ignore_eos=True))
        assert answer.usage.completion_tokens == 16

    def test_the_text_is_that_of_its_tokens(self, client, served_model):
        tokenizer = make_tokenizer()
        before = tokenizer(PROMPT["prompt"]).input_ids
        answer = client.completions.create(**{**PROMPT, "max_tokens": 80}, logprobs=0)
        ids = [
            tokenizer.convert_tokens_to_ids(tokenizer.tokenize(token)) for token in answer.choices[0].logprobs.tokens
        ]
        if all(len(each) == 1 for each in ids) and "\ufffd" not in answer.choices[0].text:
            pieces = text_pieces(tokenizer, before, [each[0] for each in ids])
            assert "".join(pieces) == answer.choices[0].text


class TestBudgets:
    @pytest.mark.parametrize("level", SHARES)
    def test_a_share_runs_exactly_its_level(self, client, level):
        for answer in (chat(client, **extra(budget=level)), chat(client, model=f"tiny:{level}")):
            said = report(answer)
            assert said["asked"] == said["level"] == said["floor"] == level
            assert said["levels"] == {level: answer.usage.completion_tokens}
            assert said["ttft_ms"] > 0
            assert said["queue_ms"] >= 0

    def test_levels_give_other_texts(self, client):
        texts = {chat(client, model=f"tiny:{level}", max_tokens=30).choices[0].message.content for level in SHARES}
        assert len(texts) > 2

    def test_a_time_gives_the_widest_level_that_fits_and_says_whether_it_was_kept(self, server):
        status, headers, answer = server.post({**GREEDY, "budget": "tpot=6.5ms,ttft=1s"})
        assert status == 200
        said = answer["usage"]["flextron"]
        assert (said["level"], said["floor"]) == ("0.6x", "0.4x")
        assert said["met"]["ttft"] in (True, False)
        assert said["met"]["tpot"] == (said["tpot_ms"] <= 6.5)
        assert headers["x-flextron-level"] == "0.6x"
        assert headers["x-flextron-asked"] == "tpot=6.5ms,ttft=1s"
        assert headers["x-flextron-met-tpot"] == str(said["met"]["tpot"]).lower()

    def test_headers_name_times(self, server):
        _, headers, answer = server.post(GREEDY, x_slo_tpot_ms="8.5")
        assert answer["usage"]["flextron"]["asked"] == "tpot=8.5ms"
        assert headers["x-flextron-level"] == "0.8x"

    def test_tokens_tell_their_levels(self, client):
        chunks = list(chat(client, stream=True, **extra(budget="0.6x", flextron={"levels": True})))
        told = [
            chunk.choices[0].model_extra["flextron"] for chunk in chunks if "flextron" in chunk.choices[0].model_extra
        ]
        texts = [text for each in told for text in each["texts"]]
        levels = [level for each in told for level in each["levels"]]
        assert "".join(texts) == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert set(levels) <= {"0.6x", None}
        assert len(levels) >= chat(client, **extra(budget="0.6x")).usage.completion_tokens

    def test_thinking_and_answer_have_levels_of_their_own(self, client):
        """A bias makes the text repeat the letter that ends the thinking."""
        token = make_tokenizer()("q").input_ids[0]
        budget = {"thinking": "0.4x", "answer": "full", "after": "qq"}
        answer = chat(client, logit_bias={str(token): 100}, **extra(budget=budget))
        assert report(answer)["levels"] == {"0.4x": 2, "full": 10}


def test_code_of_the_page_in_docs_runs(server, capsys):
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    exec(code.replace("http://127.0.0.1:8000", server.url).replace('"trained"', '"tiny"'), {})  # noqa: S102
    assert "{'0.6x': " in capsys.readouterr().out


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"model": "other"}, openai.NotFoundError, "ask for tiny"),
            ({"messages": []}, openai.BadRequestError, "at least one message"),
            ({"messages": [{"role": "wizard", "content": "a"}]}, openai.BadRequestError, "system, developer, user"),
            ({"messages": [{"role": "assistant", "content": "a"}]}, openai.BadRequestError, "chat template takes no"),
            ({"temperature": 3}, openai.BadRequestError, "between 0 and 2"),
            ({"max_tokens": 5000}, openai.BadRequestError, "between 1 and 4096"),
            ({"max_tokens": 2047}, openai.BadRequestError, "Ask for at most"),
            ({"n": 40}, openai.BadRequestError, "between 1 and 16"),
            ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools is not supported"),
            ({"extra_body": {"budget": "0.1x"}}, openai.BadRequestError, "Ask for 0.4x or more"),
            ({"extra_body": {"budget": "fast"}}, openai.BadRequestError, "budget"),
            ({"extra_body": {"budget": "tpot=1ms"}}, openai.BadRequestError, "takes 4 ms for a token"),
            ({"extra_body": {"buget": "0.6x"}}, openai.BadRequestError, "did you mean budget?"),
            ({"stop": ["a"] * 5}, openai.BadRequestError, "at most 4"),
        ],
    )
    def test_what_does_not_fit_is_refused_in_openais_shape(self, client, changes, kind, message):
        with pytest.raises(kind) as caught:
            chat(client, **changes)
        assert message in caught.value.body["message"]
        assert set(caught.value.body) == {"message", "type", "param", "code"}

    def test_no_model_means_the_one_that_is_there(self, server):
        assert server.post({key: value for key, value in GREEDY.items() if key != "model"})[0] == 200

    def test_fields_without_effect_are_named(self, server):
        status, headers, _ = server.post({**GREEDY, "store": True, "user": "me", "verbosity\r\nx: y": 1})
        assert status == 200
        assert headers["x-flextron-ignored"] == "store,verbosity\\r\\nx: y"

    def test_a_prompt_that_is_too_long(self, client):
        with pytest.raises(openai.BadRequestError, match="reads at most") as caught:
            chat(client, messages=[{"role": "user", "content": "many words " * 500}])
        assert caught.value.code == "context_length_exceeded"

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_failed_step_is_an_error_of_its_requests_only(self, served_model, stream, monkeypatch, capfd):
        with engine_of(make_model()) as engine, serving(engine, options_for(served_model)) as served:
            logits = engine._mixed.logits

            def fails(*args, **kwargs):
                raise RuntimeError("out of everything")

            with served.client() as client:
                monkeypatch.setattr(engine._mixed, "logits", fails)
                with pytest.raises(openai.APIError, match="out of everything"):
                    list(chat(client, stream=stream))
                monkeypatch.setattr(engine._mixed, "logits", logits)
                assert chat(client).choices[0].message.content


class TestPlaces:
    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["tiny", *(f"tiny:{name}" for name in reversed(SHARES))]
        assert client.models.retrieve("tiny:0.6x").owned_by == "flextron"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("tiny:0.1x")

    def test_levels(self, server):
        _, _, said = server.ask("GET", "/v1/flextron/levels")
        assert [level["name"] for level in said["levels"]] == list(SHARES)
        assert said["levels"][1] == {
            "name": "0.6x", "share": 0.6, "loss": 3.4, "step_ms": 6.0, "prefill_ms_per_token": 1.2,
        }  # fmt: skip
        assert said["stats"]["healthy"]
        assert said["default"] == {"budget": "full", "adaptive": True, "floor": "0.4x"}

    def test_metrics(self, client, server):
        chat(client, **extra(budget="0.6x"))
        _, headers, text = server.ask("GET", "/metrics")
        assert headers["content-type"].startswith("text/plain")
        lines = text.decode().splitlines()
        tokens = next(line for line in lines if line.startswith('flextron_tokens_total{level="0.6x"}'))
        assert float(tokens.split()[-1]) >= 12
        for name in ("time_to_first_token_seconds_count", "running", "waiting", "cap", "cache_used", "healthy"):
            assert any(line.startswith(f"flextron_{name}") for line in lines), name

    def test_page(self, server):
        status, headers, body = server.ask("GET", "/")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "script-src 'self'" in headers["content-security-policy"]
        assert b'<script src="/page/page.js">' in body
        for name in ("page.js", "page.css"):
            assert server.ask("GET", f"/page/{name}")[0] == 200
        assert server.ask("GET", "/page/..%2fapp.py")[0] == 404

    def test_unknown_places_and_methods(self, server):
        assert server.ask("GET", "/v2")[0] == 404
        status, headers, body = server.ask("GET", "/v1/chat/completions")
        assert (status, headers["allow"]) == (405, "POST")
        assert "GET is not for" in body["error"]["message"]

    def test_health(self, server, served_model):
        assert server.ask("GET", "/health")[::2] == (200, {"status": "ok"})
        with engine_of(make_model()) as engine, serving(engine, options_for(served_model)) as served:
            engine.stop()
            assert served.ask("GET", "/health")[::2] == (503, {"status": "dead"})
            status, headers, body = served.post(GREEDY)
            assert (status, body["error"]["code"]) == (503, "stopped")
            assert int(headers["retry-after"]) > 0
            served.service.draining = True
            assert served.ask("GET", "/health")[::2] == (503, {"status": "draining"})
            served.app.state.service = None
            assert served.ask("GET", "/health")[::2] == (503, {"status": "loading"})
            assert served.post(GREEDY)[2]["error"]["code"] == "loading"


class TestLimitsOfTime:
    def test_a_text_ends_at_the_limit_with_what_it_has(self, shared_engine, served_model):
        options = options_for(served_model)
        options = replace(options, limits=replace(options.limits, seconds=0.15))
        with serving(shared_engine, options) as served, served.client() as client:
            answer = chat(client, max_tokens=1900, **extra(ignore_eos=True))
            assert answer.choices[0].finish_reason == "length"
            assert 0 < answer.usage.completion_tokens < 1900
        wait_until_idle(shared_engine)

    def test_comments_keep_a_stream_alive(self, shared_engine, served_model):
        options = replace(options_for(served_model), keep_alive_seconds=0.05)
        gate = threading.Event()
        real = shared_engine.submit
        with serving(shared_engine, options) as served:
            served.service.engine = Late(shared_engine, gate)
            threading.Timer(0.4, gate.set).start()
            _, _, body = served.post({**GREEDY, "stream": True})
        assert real
        assert body.count(b": keep-alive\n\n") >= 2
        assert body.endswith(b"data: [DONE]\n\n")


class Late:
    """The real engine, which gets requests later."""

    def __init__(self, engine, gate):
        self._engine, self._gate = engine, gate

    def submit(self, request, handler):
        def later():
            self._gate.wait()
            self._engine.submit(request, handler)

        threading.Thread(target=later).start()

    def __getattr__(self, name):
        return getattr(self._engine, name)


def wait_until_idle(engine, seconds=10):
    until = time.monotonic() + seconds
    while engine.stats().running + engine.stats().waiting:
        assert time.monotonic() < until, engine.stats()
        time.sleep(0.01)
