"""What a request to OpenAI's API asks for: bodies of chat completions and of completions, checked. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from flextron.serving.api.fields import Fields, kind_of, shown
from flextron.serving.api.options import Options
from flextron.serving.api.refusal import ApiError
from flextron.serving.api.wishes import Asked, asked_of
from flextron.serving.engine import Sampling

Kind = Literal["chat", "completion"]
ROLES = ("system", "developer", "user", "assistant")
OURS = ("budget", "floor", "strict", "flextron")
"""Fields that only flextron knows: a word that is nearly one of them is a mistake."""
_SHARED = (
    *("model", "n", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("stream", "stream_options", "logprobs", "logit_bias", "response_format", "user"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", *OURS),
)
KNOWN: dict[Kind, frozenset[str]] = {
    "chat": frozenset({*_SHARED, "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}),
    "completion": frozenset({*_SHARED, "prompt"}),
}
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "modalities": (["text"],),
    "best_of": (1,),
    "use_beam_search": (False,),
    "echo": (False,),
    "suffix": ("",),
    "length_penalty": (1,),
    "typical_p": (1,),
    **dict.fromkeys(("min_p", "min_tokens"), (0,)),
    **dict.fromkeys(
        ("audio", "prediction", "web_search_options", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        (),
    ),
}
"""Fields that would change the answer and are not kept, with values that ask for nothing."""
ALIKE = 0.8
STOP_STRINGS = 4
STOP_CHARACTERS = 500
_TEMPLATE_OWN = ("conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding", "truncation")
_LARGEST_SEED = 2**63 - 1
Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """One checked request."""

    kind: Kind
    model: str
    asked: Asked
    sampling: Sampling
    messages: tuple[dict[str, str], ...] = ()
    prompts: tuple[Prompt, ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template gets beside the messages."""
    n: int = 1
    max_tokens: int | None = None
    """None leaves it to the room that there is."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    schema: Mapping[str, Any] | None = None
    """JSON schema of the answer."""
    show_levels: bool = False
    """Whether each choice says which tokens it holds and at which level each ran."""
    ignored: tuple[str, ...] = ()
    """Fields without effect."""


def parse_ask(kind: Kind, values: Mapping[str, Any], headers: Mapping[str, str], options: Options) -> Ask:
    """Read and check the body of a request.

    Raises:
        ApiError: 400 for a field that does not fit, 404 for a model that is not served.
    """
    body = Fields(values)
    ignored = _unknown(kind, body)
    name, alias = _model(body, options.name)
    stream = body.inner("stream_options")
    ask = Ask(
        kind,
        name,
        asked_of(body, alias, headers),
        _sampling(kind, body, options),
        n=body.whole("n", 1, options.limits.choices, ", the limit of this server. Send several requests.") or 1,
        max_tokens=_max_tokens(kind, body, options.limits.new_tokens),
        stop=_stop(body),
        stop_token_ids=tuple(body.items("stop_token_ids", _token_id, 64)),
        ignore_eos=body.flag("ignore_eos"),
        stream=body.flag("stream"),
        include_usage=stream.flag("include_usage"),
        schema=_schema(body),
        show_levels=body.inner("flextron").flag("levels"),
        ignored=ignored,
    )
    if kind == "chat":
        return replace(ask, messages=_messages(body), template=_template(body))
    return replace(ask, prompts=_prompts(body, ask.n, options))


def _unknown(kind: Kind, body: Fields) -> tuple[str, ...]:
    """Return the fields without effect.

    Raises:
        ApiError: 400, a field asks for what is not supported, or is nearly one of `OURS`.
    """
    ignored = []
    for name, value in body.values.items():
        if name in KNOWN[kind] or value is None:
            continue
        if name in UNSUPPORTED:
            if value not in UNSUPPORTED[name]:
                body.refuse(name, "is not supported by this server; leave it out.", "unsupported_parameter")
        elif near := get_close_matches(name, OURS, n=1, cutoff=ALIKE):
            body.refuse(shown(name), f"is no field; did you mean {near[0]}?", "unknown_parameter")
        else:
            ignored.append(name)
    return tuple(ignored)


def _model(body: Fields, served: str) -> tuple[str, str | None]:
    """Return the name that was asked for, and the budget after its colon."""
    name = body.text("model") or served
    if name == served:
        return name, None
    if name.startswith(f"{served}:"):
        return name, name[len(served) + 1 :]
    raise ApiError(
        f"the model {shown(name)} is not served here; ask for {served} or for {served}:0.6x.",
        status=404,
        param="model",
        code="model_not_found",
    )


def _sampling(kind: Kind, body: Fields, options: Options) -> Sampling:
    own = options.sampling
    return Sampling(
        temperature=body.number("temperature", 0, 2, own.temperature),
        top_p=_top_p(body, own.top_p),
        top_k=_top_k(body, own.top_k),
        seed=body.whole("seed", -_LARGEST_SEED, _LARGEST_SEED),
        presence_penalty=body.number("presence_penalty", -2, 2, own.presence_penalty),
        frequency_penalty=body.number("frequency_penalty", -2, 2, own.frequency_penalty),
        repetition_penalty=body.number("repetition_penalty", 0.01, 100, own.repetition_penalty),
        logit_bias=_logit_bias(body, options.vocabulary),
        top_logprobs=_top_logprobs(kind, body, options.limits.top_logprobs),
    )


def _top_p(body: Fields, default: float) -> float:
    top_p = body.number("top_p", 0, 1, default)
    return top_p or 1e-9  # 0 keeps the likeliest token alone


def _top_k(body: Fields, default: int) -> int:
    top_k = body.whole("top_k", -1, 10**9)
    return default if top_k is None else max(0, top_k)  # -1 keeps all, as in vLLM


def _logit_bias(body: Fields, vocabulary: int | None) -> dict[int, float]:
    inner = body.inner("logit_bias")
    found = {}
    for name in inner.values:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < (vocabulary or 10**9)):
            body.refuse("logit_bias", f"names {shown(name)}, which is no token of this model.")
        found[int(name)] = inner.number(name, -100, 100, 0.0)
    return found


def _top_logprobs(kind: Kind, body: Fields, most: int) -> int | None:
    if kind == "completion":
        return body.whole("logprobs", 0, most)
    wanted = body.flag("logprobs")
    top = body.whole("top_logprobs", 0, most)
    if top is not None and not wanted:
        body.refuse("top_logprobs", "needs logprobs: true.")
    return (top or 0) if wanted else None


def _max_tokens(kind: Kind, body: Fields, most: int) -> int | None:
    way_out = ", the limit of this server (--max-tokens). Ask for fewer."
    tokens = body.whole("max_tokens", 1, most, way_out)
    if kind == "completion":
        return tokens
    newer = body.whole("max_completion_tokens", 1, most, way_out)
    if tokens is not None and newer is not None and tokens != newer:
        body.refuse("max_tokens", f"is {tokens} and max_completion_tokens {newer}; keep one of them.")
    return newer or tokens


def _stop(body: Fields) -> tuple[str, ...]:
    if isinstance(body.values.get("stop"), str):
        found = [body.text("stop")]
    else:
        found = body.items("stop", body.checked_text, STOP_STRINGS)
    if any(not text or len(text) > STOP_CHARACTERS for text in found):
        body.refuse("stop", f"holds an empty or too long text; each has 1 to {STOP_CHARACTERS} characters.")
    return tuple(text for text in found if text)


def _token_id(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ApiError(f"{name} is {shown(value)}; it must be a token, a whole number from 0 up.", param=name)
    return value


def _schema(body: Fields) -> Mapping[str, Any] | None:
    form = body.inner("response_format")
    if not form.values:
        return None
    kind = form.one_of("type", ("text", "json_object", "json_schema"), "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    inner = form.inner("json_schema")
    if "schema" not in inner:
        inner.refuse("schema", 'is missing; send {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}.')
    return inner.inner("schema").values


def _messages(body: Fields) -> tuple[dict[str, str], ...]:
    if not isinstance(body.values.get("messages"), list) or not body.values["messages"]:
        body.unfit("messages", 'a list with at least one message, such as {"role": "user", "content": "Hello"}')
    return tuple(body.items("messages", _message, 10_000))


def _message(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ApiError(f"{name} is {kind_of(value)}; it must be an object with role and content.", param=name)
    message = Fields(value, f"{name}.")
    role = message.text("role")
    if role not in ROLES:
        message.refuse("role", f"is {shown(role)}; this server takes {', '.join(ROLES)}.")
    if message.values.get("tool_calls"):
        message.refuse("tool_calls", "are not supported by this server; leave them out.", "unsupported_parameter")
    return {"role": "system" if role == "developer" else str(role), "content": _content(message)}


def _content(message: Fields) -> str:
    if isinstance(message.values.get("content"), list):
        return "\n".join(message.items("content", _part, 1000))
    if "content" not in message:
        message.refuse("content", "is missing; it must be a string, or a list of text parts.")
    return message.text("content") or ""


def _part(name: str, value: Any) -> str:
    part = Fields(value if isinstance(value, dict) else {}, f"{name}.")
    if part.values.get("type") != "text":
        part.refuse("type", f"is {shown(part.values.get('type'))}; this server reads text parts only.")
    if "text" not in part:
        part.refuse("text", "is missing.")
    return part.text("text") or ""


def _template(body: Fields) -> Mapping[str, Any]:
    inner = body.inner("chat_template_kwargs")
    for name, value in inner.values.items():
        own = name in _TEMPLATE_OWN or name.startswith(("return_", "add_", "continue_", "max_"))
        if own or not isinstance(value, str | bool | int | float):
            inner.refuse(name, "is not for a request to set; send strings, numbers and booleans of the model's own.")
    return inner.values


def _prompts(body: Fields, n: int, options: Options) -> tuple[Prompt, ...]:
    given = body.values.get("prompt")
    if isinstance(given, str):
        return (body.checked_text("prompt", given),)
    if not isinstance(given, list) or not given:
        body.unfit("prompt", "a string, a list of strings, or token ids")
    if all(isinstance(item, int) for item in given):
        return (_token_ids("prompt", given, options),)
    most = options.limits.choices // n
    if len(given) > most:
        body.refuse("prompt", f"holds {len(given)} texts; with n={n} this server takes at most {most}. Send fewer.")
    return tuple(_prompt(f"prompt[{place}]", item, body, options) for place, item in enumerate(given))


def _prompt(name: str, item: Any, body: Fields, options: Options) -> Prompt:
    return _token_ids(name, item, options) if isinstance(item, list) else body.checked_text(name, item)


def _token_ids(name: str, items: list[Any], options: Options) -> tuple[int, ...]:
    ids = tuple(_token_id(f"{name}[{place}]", item) for place, item in enumerate(items))
    largest = max(ids, default=0)
    if options.vocabulary is not None and largest >= options.vocabulary:
        raise ApiError(f"{name} holds token {largest}; this model knows 0 to {options.vocabulary - 1}.", param=name)
    return ids
