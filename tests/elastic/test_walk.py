"""Layer by layer gives what the whole forward pass gives, and leaves the model as it was."""

import pytest
import torch

import tiny
from flextron.elastic import walk as walks
from flextron.elastic.loss import hidden_states, logits_of
from flextron.elastic.walk import batch_within, walking
from flextron.model import ElasticModel


def through_all(model, tokens: torch.Tensor) -> torch.Tensor:
    with walking(model) as walk:
        hidden = None
        for layer in range(len(model.layers)):
            hidden = walk.through(layer, tokens, hidden)
        return walk.finish(tokens, hidden)


@pytest.mark.parametrize("model_type", tiny.CONFIGS)
@torch.no_grad()
def test_equals_the_forward_pass(model_type):
    model = ElasticModel(tiny.plain_model(model_type))
    tokens = tiny.token_ids()
    for subnet in (model.search_space.full, tiny.random_subnet(model.search_space, 1)):
        with model.use(subnet):
            found, expected = through_all(model, tokens), hidden_states(model.lm, tokens, None)
            assert torch.equal(found, expected)
            tiny.assert_same_function(logits_of(model.lm, found), tiny.logits_of(model, tokens))


@torch.no_grad()
def test_layers_that_give_more_than_hidden_states(llama):
    tokens = tiny.token_ids()
    expected = hidden_states(llama.lm, tokens, None)
    base = llama.lm.base_model
    for layer in llama.layers:
        layer.module.forward = lambda *args, _own=layer.module.forward, **kwargs: (_own(*args, **kwargs), "weights")
        layer.module.register_forward_hook(lambda _module, _inputs, output: output[0])
    assert torch.equal(base(tokens, use_cache=False).last_hidden_state, expected)
    own = [vars(layer.module)["forward"] for layer in llama.layers]
    assert torch.equal(through_all(llama, tokens), expected)
    assert [vars(layer.module)["forward"] for layer in llama.layers] == own


def test_only_one_layer_runs(llama):
    ran = []
    for index, layer in enumerate(llama.layers):
        layer.mlp.closes.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    with walking(llama) as walk, torch.no_grad():
        hidden = walk.through(0, tiny.token_ids(), None)
        walk.through(2, tiny.token_ids(), hidden)
        walk.finish(tiny.token_ids(), hidden)
    assert ran == [0, 2]


def test_the_model_runs_as_before_also_after_an_error(llama):
    expected = tiny.logits_of(llama, tiny.token_ids())
    with pytest.raises(KeyboardInterrupt), walking(llama):
        raise KeyboardInterrupt
    assert all("forward" not in vars(layer.module) for layer in llama.layers)
    assert torch.equal(tiny.logits_of(llama, tiny.token_ids()), expected)


def test_batches_fit_into_memory(llama, monkeypatch):
    assert batch_within(llama, states=10, most=2048) == 2048
    monkeypatch.setattr(walks, "STATE_BYTES", 10 * 4 * tiny.HIDDEN * 100)
    assert batch_within(llama, states=10, most=2048) == 100
