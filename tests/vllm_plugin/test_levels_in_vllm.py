"""The parts of the plug-in for levels that need no vLLM: masks on any model, runners on stand-ins, the middleware."""

import asyncio
import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from flextron.errors import FlextronError
from flextron.model import ElasticModel
from flextron.serving.levels import make_levels
from flextron.vllm_plugin.masks import LevelMasks, make_masked
from flextron.vllm_plugin.middleware import LARGEST_BYTES, PATHS, REFUSED, LevelMiddleware, salt
from flextron.vllm_plugin.runners import level_of, level_runner, level_state


@pytest.fixture(scope="module")
def levels():
    model = ElasticModel(tiny.plain_model("llama"))
    return make_levels(model, sensitivity=tiny.uneven_sensitivity(model))


class TestMasks:
    def test_each_token_runs_as_its_level(self, plain, tokens):
        """Of every family: a plain model whose rows have levels of their own, beside each sub-network alone."""
        elastic = ElasticModel(copy.deepcopy(plain))
        levels = make_levels(elastic, sensitivity=tiny.uneven_sensitivity(elastic))
        masked = copy.deepcopy(plain)
        masks = LevelMasks(levels, 64, "cpu")
        assert masks.install(masked, plain.config.model_type) == 2 * tiny.LAYERS
        row = tokens[:1]
        tiny.assert_same_function(tiny.logits_of(masked, row), tiny.logits_of(plain, row))
        for index, level in enumerate(levels):
            masks.set([index], [row.shape[1]])
            with elastic.use(level.subnet):
                tiny.assert_same_function(tiny.logits_of(masked, row), tiny.logits_of(elastic, row))

    def test_a_flattened_batch(self, levels):
        linear = nn.Linear(8, 5)
        plain = copy.deepcopy(linear)
        level_N = torch.zeros(16, dtype=torch.long)
        make_masked(linear, [0, 1, 3, 4], 4, level_N)
        level_N[:6] = torch.tensor([0, 3, 2, 1, 0, 2])
        x_NC = torch.randn(6, 8)
        kept_N = torch.tensor([0, 8, 6, 2, 0, 6])
        expected = plain(x_NC * (torch.arange(8) < kept_N[:, None])) * (kept_N > 0)[:, None]
        torch.testing.assert_close(linear(x_NC), expected)
        torch.testing.assert_close(linear(x_NC[None])[0], expected)

    def test_blocks_of_columns_add_up(self):
        """As with tensor parallelism, where each device holds some of the columns, and the first one the bias."""
        whole = nn.Linear(8, 5)
        level_N = torch.tensor([0, 1, 2, 3])
        x_NC = torch.randn(4, 8)
        parts = []
        for rank in range(2):
            part = nn.Linear(4, 5, bias=rank == 0)
            columns = slice(4 * rank, 4 * rank + 4)
            part.weight.data = whole.weight.data[:, columns]
            if rank == 0:
                part.bias.data = whole.bias.data
            part.input_size, part.input_size_per_partition, part.tp_rank = 8, 4, rank
            make_masked(part, [0, 1, 3, 4], 4, level_N)
            parts.append(part(x_NC[:, columns]))
        make_masked(whole, [0, 1, 3, 4], 4, level_N)
        torch.testing.assert_close(sum(parts), whole(x_NC))

    def test_a_projection_that_gives_a_tuple(self):
        class Pair(nn.Linear):
            def forward(self, x):
                return super().forward(x), None

        pair = Pair(4, 3)
        make_masked(pair, [0, 2], 2, torch.tensor([0, 1]))
        output, bias = pair(torch.ones(2, 4))
        assert bias is None
        assert not output[0].any()
        torch.testing.assert_close(output[1], pair.weight.sum(1) + pair.bias)

    def test_what_does_not_fit_is_refused(self, levels):
        masks = LevelMasks(levels, 8, "cpu")
        with pytest.raises(FlextronError, match=r"layers\.0\.mlp\.down_proj is there 0 times"):
            masks.install(nn.Linear(2, 2), "llama")
        with pytest.raises(FlextronError, match="40 neurons in each layer, this one has 80"):
            masks.install(tiny.plain_model("llama", intermediate_size=80), "llama")
        with pytest.raises(FlextronError, match="cannot hold 3 units"):
            make_masked(nn.Linear(8, 2), [1], 3, masks.level_N)
        with pytest.raises(FlextronError, match="how many columns"):
            make_masked(nn.ReLU(), [1], 3, masks.level_N)
        linear = nn.Linear(6, 2)
        make_masked(linear, [1], 3, masks.level_N)
        with pytest.raises(FlextronError, match="Report"):
            make_masked(linear, [1], 3, masks.level_N)


def params(asked=None):
    return SimpleNamespace(extra_args=None if asked is None else {"flextron": asked})


class TestRunners:
    def test_level_of_a_request(self, levels, caplog):
        full = len(levels) - 1
        assert level_of(levels, params()) == level_of(levels, None) == full
        assert [level_of(levels, params(asked)) for asked in (0, 1.0, levels[2].name)] == [0, 1, 2]
        assert not caplog.records
        for asked in ("tiny", 99, [1], 0.5):
            assert level_of(levels, params(asked)) == full
        assert len(caplog.records) == 4

    def test_the_older_runner(self, levels):
        class Runner:
            def _model_forward(self, **kwargs):
                return masks.level_N.tolist(), kwargs

        masks = LevelMasks(levels, 8, "cpu")
        runner = Runner()
        runner.__class__ = level_runner(Runner)
        runner.flextron_masks = masks
        runner.requests = {name: SimpleNamespace(sampling_params=params(asked)) for name, asked in (("a", 1), ("b", 0))}
        runner.input_batch = SimpleNamespace(req_ids=["b", "a", "gone"], num_reqs=2)
        runner.query_start_loc = SimpleNamespace(np=np.array([0, 2, 5, 5, 5]))
        full = len(levels) - 1
        assert runner._model_forward(x=1) == ([0, 0, 1, 1, 1, full, full, full], {"x": 1})

    def test_the_newer_runner(self, levels):
        class State:
            def __init__(self):
                self.added = []

            def add_request(self, req_index, new_req_data):
                self.added.append(req_index)

            def prepare_inputs(self, input_batch, req_states):
                return {"positions": req_states}

        masks = LevelMasks(levels, 8, "cpu")
        state = State()
        state.__class__ = level_state(State)
        state.flextron_masks, state.flextron_levels = masks, {}
        state.add_request(5, SimpleNamespace(sampling_params=params(1)))
        state.add_request(3, SimpleNamespace(sampling_params=params("full")))
        batch = SimpleNamespace(
            num_reqs=2, query_start_loc_np=np.array([0, 1, 4, 4]), idx_mapping_np=np.array([3, 5, 9])
        )
        assert state.prepare_inputs(batch, "states") == {"positions": "states"}
        assert state.added == [5, 3]
        assert masks.level_N[:4].tolist() == [len(levels) - 1, 1, 1, 1]


class Served:
    """A stand-in for vLLM's server, and what reached it."""

    def __init__(self, levels=None, names=("smol",)):
        self.scopes, self.bodies = [], []
        self.middleware = LevelMiddleware(self.answer, levels, names)

    async def answer(self, scope, receive, send):
        message = await receive()
        self.scopes.append(scope)
        self.bodies.append(message["body"])
        self.after = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def post(self, body, *, path=PATHS[0], headers=(), parts=1, method="POST", **scope):
        """Status, headers and body of the answer."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        size = -(-len(body) // parts) or 1
        pieces = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
        messages = [
            {"type": "http.request", "body": piece, "more_body": place + 1 < len(pieces)}
            for place, piece in enumerate(pieces)
        ]
        messages.append({"type": "http.disconnect"})
        sent = []

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        all_headers = [(b"content-length", str(len(body)).encode()), *headers]
        asked = {"type": "http", "method": method, "path": path, "headers": all_headers, **scope}
        asyncio.run(self.middleware(asked, receive, send))
        start, end = sent
        return start["status"], dict(start["headers"]), end["body"]

    def passed(self, body, **kwargs):
        """The body that reaches vLLM, and the level in the answer."""
        status, headers, _ = self.post(body, **kwargs)
        assert status == 200
        return json.loads(self.bodies[-1]), headers[b"x-flextron-level"].decode()

    def refused(self, body, **kwargs):
        status, headers, answer = self.post(body, **kwargs)
        assert headers[b"content-type"] == b"application/json"
        assert not self.bodies
        return status, json.loads(answer)["error"]


@pytest.fixture
def served(levels):
    return Served(levels)


class TestMiddleware:
    @pytest.mark.parametrize(
        ("body", "headers", "level"),
        [
            ({}, (), "full"),
            ({"budget": "0.8x"}, (), "0.8x"),
            ({"budget": 0}, (), None),
            ({"model": "smol:0.8x"}, (), "0.8x"),
            ({"vllm_xargs": {"flextron": 1, "other": "x"}}, (), None),
            ({"vllm_xargs": None}, ((b"x-flextron-budget", b"0.8x"),), "0.8x"),
            ({"budget": "full", "model": "smol:0.8x"}, ((b"x-flextron-budget", b"0.7x"),), "full"),
            ({"model": "smol:0.8x"}, ((b"x-flextron-budget", b"0.7x"),), "0.8x"),
        ],
    )
    @pytest.mark.parametrize("path", PATHS)
    def test_the_level_reaches_vllm_with_its_salt(self, served, levels, body, headers, level, path):
        named = {"model": "smol", "messages": [], **body}
        passed, answered = served.passed(named, headers=headers, path=path, parts=3)
        level = (
            levels[body.get("budget", (body.get("vllm_xargs") or {}).get("flextron"))].name if level is None else level
        )
        assert answered == level
        assert passed == {
            "model": "smol",
            "messages": [],
            "vllm_xargs": {**(body.get("vllm_xargs") or {}), "flextron": levels.find(level)},
            "cache_salt": salt(levels, level),
        }
        lengths = [value for name, value in served.scopes[-1]["headers"] if name == b"content-length"]
        assert lengths == [str(len(served.bodies[-1])).encode()]
        assert served.after == {"type": "http.disconnect"}

    def test_names_that_vllm_serves_stay(self, levels):
        passed, _ = Served(levels, ("smol", "smol:0.8x")).passed({"model": "smol:0.8x"})
        assert passed["model"] == "smol:0.8x"

    def test_salts_differ_by_level_weights_and_user(self, levels):
        salts = {salt(levels, name, users) for name in levels.names for users in (None, "me", "you")}
        assert len(salts) == 3 * len(levels)
        assert all(len(text) <= 128 and not set(text) & set("@/\\\0") for text in salts)

    def test_a_users_own_salt_cannot_be_that_of_another_level(self, served, levels):
        passed, _ = served.passed({"model": "smol", "cache_salt": salt(levels, levels[0].name)})
        assert passed["cache_salt"] not in {salt(levels, name) for name in levels.names}

    @pytest.mark.parametrize(
        ("body", "headers", "status", "param", "code"),
        [
            ({"budget": "12ms"}, (), 400, "budget", "unknown_budget"),
            ({"budget": "0.0001x"}, (), 400, "budget", "unknown_budget"),
            ({"budget": {"thinking": "0.6x"}}, (), 400, "budget", "unknown_budget"),
            ({"budget": 99}, (), 400, "budget", "unknown_budget"),
            ({"model": "smol:latest"}, (), 404, "model", "model_not_found"),
            ({"vllm_xargs": {"flextron": "tiny"}}, (), 400, "vllm_xargs", "unknown_budget"),
            ({}, ((b"x-flextron-budget", b"\xff"),), 400, "x-flextron-budget", "unknown_budget"),
        ],
    )
    def test_unknown_budgets_are_refused(self, served, body, headers, status, param, code):
        found, error = served.refused({"model": "smol", **body}, headers=headers)
        assert found == status
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
        assert "full" in error["message"] or "level" in error["message"]

    @pytest.mark.parametrize("path", REFUSED)
    def test_other_paths_take_no_levels(self, served, path):
        for body in ({"model": "smol:0.8x"}, {"sampling_params": {"extra_args": {"flextron": 1}}}):
            status, error = served.refused(body, path=path)
            assert (status, error["code"]) == (400, "no_levels")
        assert served.post({"model": "smol"}, path=path)[0] == 200

    @pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xff", b'{"vllm_xargs": [1]}', b"[" * 100_000])
    def test_what_vllm_will_refuse_stays_as_it_is(self, served, body):
        assert served.post(body)[0] == 200
        assert served.bodies == [body]

    def test_a_body_that_is_too_large(self, served):
        status, error = served.refused(b" " * (LARGEST_BYTES + 1), parts=2)
        assert (status, error["code"]) == (413, "too_large")

    def test_a_client_that_goes_away(self, served):
        async def gone():
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "POST", "path": PATHS[0], "headers": []}
        asyncio.run(served.middleware(scope, gone, None))
        assert not served.bodies

    @pytest.mark.parametrize("other", [{"method": "GET"}, {"path": "/health"}, {"type": "websocket"}])
    def test_all_else_passes(self, served, other):
        assert served.post(b"x", **other)[1] == {b"a": b"b"}

    def test_levels_and_names_are_vllms(self, levels, tmp_path, monkeypatch):
        levels.save(tmp_path)
        served = Served(names=None)
        args = SimpleNamespace(model=str(tmp_path), served_model_name=["smol"])
        app = SimpleNamespace(state=SimpleNamespace(args=args))
        assert served.passed({"model": "smol:0.8x"}, app=app)[1] == "0.8x"
        monkeypatch.setenv("FLEXTRON_LEVELS", str(tmp_path))
        args.model, args.served_model_name = "hub/name", None
        served = Served(names=None)
        assert served.passed({"model": "hub/name:0.8x"}, app=app)[0]["model"] == "hub/name"

    def test_below_a_root_path(self, served):
        assert served.passed({"model": "smol:0.8x"}, path="/llm" + PATHS[0], root_path="/llm")[1] == "0.8x"
