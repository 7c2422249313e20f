"""Widths per token: blocks equal the masked definition, and a mixed batch equals its rows run alone."""

import copy

import pytest
import torch

import tiny
from flextron.errors import SubnetError
from flextron.inference import per_token
from flextron.inference.per_token import TokenWidths, use_token_widths
from flextron.subnet import Subnet
from tiny import assert_same_function, differs, logits_of

ROWS = 3


def sizes(model):
    """Return the numbers of layers, neurons, KV groups, and query heads per group."""
    first = model.layers[0]
    return len(model.layers), first.mlp.width.full, first.attention.width.full, first.attention.heads_per_unit


def random_widths(model, rows=ROWS, time=tiny.TIME, seed=0):
    layers, *most = sizes(model)
    draw = torch.Generator().manual_seed(seed)
    return TokenWidths(*(torch.randint(0, limit + 1, (layers, rows, time), generator=draw) for limit in most))


def same_widths(model, neurons=None, kv_groups=None, query_heads=None):
    layers, *most = sizes(model)
    wished = (neurons, kv_groups, query_heads)
    return TokenWidths(
        *(torch.full((layers, 1, 1), limit if wish is None else wish) for wish, limit in zip(wished, most, strict=True))
    )


def run(model, tokens, widths, **options):
    with use_token_widths(model, widths, **options):
        return logits_of(model, tokens)


@pytest.fixture
def tokens():
    return tiny.token_ids(ROWS)


@pytest.fixture(params=["blocks", "the widest"])
def way(request, monkeypatch):
    """Run all batches in blocks, or all at the widest token's width, whatever their size."""
    monkeypatch.setattr(per_token, "FEW_TOKENS", 0 if request.param == "blocks" else 10_000)


class TestContract:
    def test_full_widths_equal_the_full_model(self, model, tokens):
        expected = logits_of(model, tokens)
        assert torch.equal(run(model, tokens, same_widths(model)), expected)
        assert_same_function(run(model, tokens, same_widths(model), masked=True), expected)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.usefixtures("way")
    def test_in_less_time_equals_the_definition(self, model, tokens, seed):
        widths = random_widths(model, seed=seed)
        assert_same_function(run(model, tokens, widths), run(model, tokens, widths, masked=True))

    def test_a_token_more_or_less_shows(self, model, tokens):
        """Changing one token's width in one layer changes its logits."""
        widths = random_widths(model)
        other = copy.deepcopy(widths)
        other.neurons[0, 0, -1] = sizes(model)[1] - widths.neurons[0, 0, -1]
        results = [run(model, tokens, either)[0, -1] for either in (widths, other)]
        assert differs(*results)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.usefixtures("way")
    def test_rows_of_a_mixed_batch_equal_their_own_runs(self, model, tokens, masked):
        subnets = [*(tiny.random_subnet(model.search_space, seed) for seed in range(ROWS - 1)), model.search_space.full]
        mixed = run(model, tokens, TokenWidths.of_rows(model, subnets), masked=masked)
        for row, subnet in enumerate(subnets):
            with model.use(subnet):
                assert_same_function(mixed[row : row + 1], logits_of(model, tokens[row : row + 1]))

    def test_a_subnetwork_chosen_inside_is_run_by_all_tokens(self, model, tokens):
        """So a full model that teaches is the full model, whatever its student's tokens use."""
        full = model.search_space.full
        expected = logits_of(model, tokens)
        widths = random_widths(model)
        routed = run(model, tokens, widths)
        with use_token_widths(model, widths):
            with model.use(full):
                assert torch.equal(logits_of(model, tokens), expected)
            assert torch.equal(logits_of(model, tokens), routed)

    def test_fewer_query_heads_equal_a_model_without_them(self, plain, model, tokens):
        layers, _, groups, heads = sizes(model)
        if heads == 1:
            pytest.skip("one query head in each KV group: the axis of the groups")
        without = copy.deepcopy(plain)
        for layer in range(layers):
            columns = tiny.closing_matrix(without, model.family, layer, "attention").unflatten(1, (groups, heads, -1))
            with torch.no_grad():
                columns[:, :, 1:] = 0
        assert_same_function(run(model, tokens, same_widths(model, query_heads=1)), logits_of(without, tokens))

    @pytest.mark.parametrize("of", ["tokens", "rows"])
    @pytest.mark.usefixtures("way")
    def test_gradients_equal_those_of_masks(self, model, tokens, of):
        subnets = [tiny.random_subnet(model.search_space, seed) for seed in range(ROWS)]
        widths = random_widths(model) if of == "tokens" else TokenWidths.of_rows(model, subnets)
        gradients = []
        for masked in (False, True):
            model.lm.zero_grad()
            with use_token_widths(model, widths, masked=masked):
                model(tokens, labels=tokens, use_cache=False).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.lm.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)

    def test_cached_steps_equal_one_pass(self, model, tokens):
        widths = random_widths(model)
        once = run(model, tokens, widths)
        half = tiny.TIME // 2
        cache, parts = None, []
        for start, end in ((0, half), *((place, place + 1) for place in range(half, tiny.TIME))):
            part = TokenWidths(
                widths.neurons[..., start:end],
                widths.kv_groups.amax((1, 2), keepdim=True).expand_as(widths.kv_groups)[..., start:end],
                widths.query_heads[..., start:end],
            )
            with use_token_widths(model, part), torch.no_grad():
                output = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        same = TokenWidths(
            widths.neurons, widths.kv_groups.amax((1, 2), keepdim=True).expand_as(widths.kv_groups), widths.query_heads
        )
        assert_same_function(torch.cat(parts, 1), run(model, tokens, same))
        assert once.shape == torch.cat(parts, 1).shape

    def test_left_out_everywhere_equals_the_smallest(self, model, tokens):
        with model.use(Subnet((0,) * tiny.LAYERS, (0,) * tiny.LAYERS)):
            expected = logits_of(model, tokens)
        assert_same_function(run(model, tokens, same_widths(model, neurons=0, kv_groups=0)), expected)

    def test_all_is_as_before_after_the_block(self, model, tokens):
        before = logits_of(model, tokens)
        subnet = tiny.random_subnet(model.search_space, 3)
        with model.use(subnet):
            narrowed = logits_of(model, tokens)
            inside = [run(model, tokens, random_widths(model), masked=masked) for masked in (False, True)]
            assert torch.equal(logits_of(model, tokens), narrowed)
        assert_same_function(*inside)
        assert torch.equal(logits_of(model, tokens), before)


@pytest.mark.usefixtures("way")
def test_no_token_takes_a_block_and_one_takes_all(llama):
    tokens = tiny.token_ids(ROWS)
    widths = same_widths(llama, neurons=0)
    every = widths.neurons.expand(-1, ROWS, tiny.TIME).clone()
    every[:, 1, 3] = sizes(llama)[1]
    one = TokenWidths(every, widths.kv_groups, widths.query_heads)
    assert_same_function(run(llama, tokens, one), run(llama, tokens, one, masked=True))


@pytest.mark.parametrize(("rows", "time"), [(1, 1), (5, 1), (1, 7)])
def test_batches_of_all_shapes(llama, rows, time):
    tokens = tiny.token_ids(rows, time)
    widths = random_widths(llama, rows, time)
    assert_same_function(run(llama, tokens, widths), run(llama, tokens, widths, masked=True))


def test_wrong_widths_are_refused(llama):
    layers, neurons, _, _ = sizes(llama)
    good = same_widths(llama)
    wide = TokenWidths(torch.tensor([0, neurons + 1]).expand(layers, 1, 2), good.kv_groups, good.query_heads)
    short = TokenWidths(good.neurons, good.kv_groups[:1], good.query_heads)
    with pytest.raises(
        ValueError, match=rf"neurons are 0 to {neurons + 1}; for this model they must be 0 to {neurons}"
    ):
        wide.check(llama)
    with pytest.raises(ValueError, match=rf"kv_groups has the shape \[1, 1, 1\]; it must be \[{layers}, B, T\]"):
        short.check(llama)
    with pytest.raises(SubnetError, match="layers"):
        TokenWidths.of_rows(llama, [Subnet((1,), (1,))])
