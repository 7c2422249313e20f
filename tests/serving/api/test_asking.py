"""Bodies of requests: what is read, what is refused, and how it is said. No model, no torch."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.serving.api.asking import KNOWN, UNSUPPORTED, parse_ask
from flextron.serving.api.fields import parse_object
from flextron.serving.api.options import Options
from flextron.serving.api.refusal import ApiError, of_engine
from flextron.serving.engine import RefusedError, StoppedError

OPTIONS = Options(name="m", vocabulary=100)
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"prompt": "Hi"}


def chat(**fields):
    return parse_ask("chat", {**CHAT, **fields}, {}, OPTIONS)


def completion(**fields):
    return parse_ask("completion", {**COMPLETION, **fields}, {}, OPTIONS)


def refusal(read, **fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    return caught.value


def test_what_is_left_open_is_openais_default():
    ask = chat()
    assert (ask.n, ask.stream, ask.stop, ask.max_tokens, ask.schema) == (1, False, (), None, None)
    assert (ask.sampling.temperature, ask.sampling.top_p, ask.sampling.top_logprobs) == (1.0, 1.0, None)
    assert ask.messages == ({"role": "user", "content": "Hi"},)
    nothing = dict.fromkeys(sorted(KNOWN["chat"] - {"messages"}))  # null means the default
    assert chat(**nothing) == ask


def test_what_is_given_is_read():
    ask = chat(
        n=2, max_completion_tokens=7, temperature=0, top_p=0.5, top_k=-1, seed=-3, stop="a", stream=True,
        stream_options={"include_usage": True}, logprobs=True, top_logprobs=4, logit_bias={"5": -100},
        presence_penalty=1, frequency_penalty=-1.5, repetition_penalty=1.2, flextron={"levels": True},
        response_format={"type": "json_object"}, stop_token_ids=[3], ignore_eos=True,
    )  # fmt: skip
    sampling = ask.sampling
    assert (ask.n, ask.max_tokens, ask.stop, ask.stream, ask.include_usage) == (2, 7, ("a",), True, True)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0, 0.5, 0, -3)
    assert (sampling.top_logprobs, sampling.logit_bias) == (4, {5: -100.0})
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1.5, 1.2)
    assert (ask.show_levels, ask.schema, ask.stop_token_ids, ask.ignore_eos) == (True, {"type": "object"}, (3,), True)
    assert completion(logprobs=0).sampling.top_logprobs == 0
    assert completion(prompt=[1, 2]).prompts == ((1, 2),)
    assert completion(prompt=["a", [1]]).prompts == ("a", (1,))
    assert chat(max_tokens=5.0).max_tokens == 5
    assert chat(messages=[{"role": "developer", "content": "a"}]).messages[0]["role"] == "system"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "x"}, 'the model "x" is not served here; ask for m or for m:0.6x.'),
        ({"model": 5}, "model is a number; it must be a string."),
        ({"n": 0}, "n is 0; it must lie between 1 and 16, the limit of this server. Send several requests."),
        ({"n": 1.5}, "n is a number, 1.5; it must be a whole number."),
        ({"n": True}, "n is a boolean, true; it must be a whole number."),
        ({"n": 10**400}, "n is too large a number; it must lie between"),
        ({"temperature": -0.1}, "temperature is -0.1; it must lie between 0 and 2."),
        ({"temperature": "hot"}, 'temperature is a string, "hot"; it must be a number.'),
        ({"max_tokens": 0}, "max_tokens is 0; it must lie between 1 and 4096"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "keep one of them"),
        ({"stop": ["a", 5]}, "stop[1] is a number; it must be a string."),
        ({"stop": [""]}, "each has 1 to 500 characters"),
        ({"stop": {"a": 1}}, "it must be a list"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true."),
        ({"logprobs": True, "top_logprobs": 21}, "between 0 and 20"),
        ({"logprobs": 3}, "it must be true or false"),
        ({"logit_bias": {"x": 1}}, 'names "x", which is no token'),
        ({"logit_bias": {"100": 1}}, 'names "100", which is no token'),
        ({"logit_bias": {"1": 101}}, "logit_bias.1 is 101; it must lie between -100 and 100."),
        ({"response_format": {"type": "xml"}}, "must be one of text, json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema is missing"),
        ({"messages": "Hi"}, "messages is a string"),
        ({"messages": ["Hi"]}, "messages[0] is a string; it must be an object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "this server takes system, developer, user, assistant."),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "this server reads text parts only"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "is not for a request to set"),
        ({"chat_template_kwargs": {"think": []}}, "is not for a request to set"),
        ({"tools": [1]}, "tools is not supported by this server; leave it out."),
        ({"floors": "0.5x"}, '"floors" is no field; did you mean floor?'),
        ({"flextron": 1}, "it must be an object"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    assert message in str(refusal(chat, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "it must be a string, a list of strings, or token ids"),
        ({"prompt": [1, "a"]}, "prompt[0] is a number; it must be a string."),
        ({"prompt": [100]}, "prompt holds token 100; this model knows 0 to 99."),
        ({"prompt": [-1]}, "prompt[0] is -1; it must be a token"),
        ({"prompt": ["a"] * 9, "n": 2}, "with n=2 this server takes at most 8"),
        ({"echo": True}, "echo is not supported"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(fields, message):
    assert message in str(refusal(completion, **fields))


def test_fields_that_ask_for_nothing_pass():
    harmless = {name: values[0] for name, values in UNSUPPORTED.items() if values}
    assert chat(**harmless, metadata={"a": 1}).ignored == ("metadata",)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b'{"a": NaN}', b"\xff", b'{"a":' * 100_000, b"9" * 5000, b'"\\ud800"', b"null"]
)
def test_bodies_that_are_no_objects(body):
    with pytest.raises(ApiError) as caught:
        parse_object(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert len(str(caught.value)) < 500


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(KNOWN["chat"] | KNOWN["completion"])), ANYTHING, max_size=5))
@settings(max_examples=300, deadline=None)
def test_whatever_is_sent_is_read_or_refused(fields):
    for kind, base in (("chat", CHAT), ("completion", COMPLETION)):
        refused = refusal_of(kind, {**base, **fields})
        if refused is not None:
            assert refused.status in (400, 404)
            json.dumps(refused.body()).encode()


def refusal_of(kind, body) -> ApiError | None:
    try:
        parse_ask(kind, body, {}, OPTIONS)
    except ApiError as error:
        return error
    return None


def test_refusals_of_the_engine():
    stopped = of_engine(StoppedError("it stops"))
    assert (stopped.status, stopped.headers()) == (503, {"retry-after": "5"})
    full = of_engine(RefusedError("full", retry_after=2.1))
    assert (full.status, full.headers()) == (429, {"retry-after": "3"})
    assert ApiError("no", status=429).headers() == {"x-should-retry": "false"}
    assert of_engine(ValueError("never")).status == 400
