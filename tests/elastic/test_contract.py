"""What holds for every family: equalities between an elastic model and the plain one that it was made from."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from flextron.elastic.permutation import permute
from flextron.errors import SubnetError
from flextron.model import ElasticModel
from flextron.subnet import SearchSpace, Subnet
from tiny import assert_same_function, differs, logits_of, masked, ranking_for


def subnets(space: SearchSpace) -> list[Subnet]:
    """Uneven ones, zeros on each axis, uniform ones and the smallest."""
    half, groups = space.neurons[len(space.neurons) // 2], space.kv_groups[-1]
    return [
        *(tiny.random_subnet(space, seed) for seed in range(4)),
        tiny.random_subnet(space, 4, kv_groups=(0, groups, 1)),
        tiny.random_subnet(space, 5, kv_groups=(1, 0, 0)),
        tiny.random_subnet(space, 6, neurons=(0, half, 0)),
        space.uniform(half),
        space.uniform(kv_groups=groups - 1),
        space.uniform(space.neurons[1], 1),
        space.smallest,
    ]


def assert_narrowed_equals_masked(model: ElasticModel, plain, tokens: torch.Tensor) -> None:
    for subnet in subnets(model.search_space):
        expected = masked(plain, subnet, groups=model.search_space.kv_groups[-1], ranking=model.ranking)
        with model.use(subnet):
            assert_same_function(logits_of(model, tokens), logits_of(expected, tokens))


class TestContract:
    def test_full_width_equals_the_original(self, plain, model, tokens):
        assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))

    def test_parameters_stay_and_keep_their_names(self, plain):
        lm = copy.deepcopy(plain)
        before, keys = dict(lm.named_parameters()), list(lm.state_dict())
        ElasticModel(lm)
        assert list(lm.state_dict()) == keys
        assert all(parameter is before[name] for name, parameter in lm.named_parameters())

    def test_narrowed_equals_masked(self, plain, model, tokens):
        assert_narrowed_equals_masked(model, plain, tokens)

    def test_a_unit_more_or_less_shows(self, model, tokens):
        """The texts and weights are such that one unit of one layer changes the logits: the other tests can fail."""
        space, results = model.search_space, []
        for neurons, groups in ((20, 2), (22, 2), (20, 1)):
            with model.use(Subnet((40, neurons, 40), (space.kv_groups[-1], groups, space.kv_groups[-1]))):
                results.append(logits_of(model, tokens))
        assert differs(results[1], results[0])
        assert differs(results[2], results[0])

    def test_permuting_changes_nothing(self, plain, model, tokens):
        permute(model, ranking_for(model))
        assert not torch.equal(model.layers[0].mlp.closes.matrix(), tiny.closing_matrix(plain, model.family, 0, "mlp"))
        assert_same_function(logits_of(model, tokens), logits_of(plain, tokens))

    def test_narrowing_permuted_equals_masking_the_original(self, plain, model, tokens):
        permute(model, ranking_for(model))
        assert_narrowed_equals_masked(model, plain, tokens)

    def test_permuting_twice_records_the_composition(self, plain, model, tokens):
        permute(model, ranking_for(model, seed=1))
        permute(model, ranking_for(model, seed=2))
        assert_same_function(logits_of(model, tokens), logits_of(plain, tokens))
        assert_narrowed_equals_masked(model, plain, tokens)
        for index, layer in enumerate(model.layers):
            groups, heads = model.ranking.kv_groups[index].long(), model.ranking.query_heads[index].long()
            original_DGQH = tiny.closing_matrix(plain, model.family, index, "attention").unflatten(
                1, (*heads.shape, -1)
            )
            now_DGQH = layer.attention.closes.matrix().unflatten(1, (*heads.shape, -1))
            assert torch.equal(now_DGQH, original_DGQH[:, groups[:, None], heads])

    def test_save_and_load_agree(self, model, tokens, tmp_path):
        space = SearchSpace(tiny.LAYERS, (0, 8, tiny.NEURONS), tuple(model.search_space.kv_groups))
        model.search_space = space
        permute(model, ranking_for(model))
        with model.use(space.uniform(8, 1)):  # what runs does not matter for what is saved
            narrow = logits_of(model, tokens)
            model.save_pretrained(tmp_path / "saved")
        full = logits_of(model, tokens)
        as_plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(logits_of(as_plain, tokens), full)
        assert not any("Elastic" in type(module).__name__ for module in as_plain.modules())
        loaded = ElasticModel.from_pretrained(tmp_path / "saved")
        assert loaded.search_space == space
        for order in ("neurons", "kv_groups", "query_heads"):
            assert torch.equal(getattr(loaded.ranking, order), getattr(model.ranking, order))
        with loaded.use(space.uniform(8, 1)):
            assert torch.equal(logits_of(loaded, tokens), narrow)

    def test_only_the_prefix_has_gradients(self, model, tokens):
        groups = model.search_space.kv_groups[-1]
        with model.use(Subnet((12, 0, 40), (1, groups, 0))):
            model(tokens, labels=tokens).loss.backward()
        for layer, neurons, kv_groups in zip(model.layers, (12, 0, 40), (1, groups, 0), strict=True):
            for sub, kept in ((layer.mlp, neurons), (layer.attention, kv_groups)):
                assert_gradient_of_prefix(sub, kept)

    def test_choosing_neither_copies_nor_changes_weights(self, model):
        before = {name: value.clone() for name, value in model.lm.state_dict().items()}
        places = storages(model)
        for subnet in subnets(model.search_space):
            with model.use(subnet):
                assert storages(model) == places
                logits_of(model, tiny.token_ids(1, 4))
        assert storages(model) == places
        after = model.lm.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


class TestCache:
    """The KV cache under layers of unlike widths, with attention skipped in layer 0 and in another one."""

    @pytest.fixture(autouse=True)
    def uneven(self, model):
        groups = model.search_space.kv_groups[-1]
        with model.use(Subnet((40, 12, 0), (0, groups - 1, groups))):
            yield

    @pytest.mark.parametrize("kv_groups", [(0, 2, 0), (0, 1, 3), (2, 0, 1), (1, 2, 0), (0, 0, 0)], ids=str)
    def test_cached_equals_uncached(self, model, kv_groups):
        with model.use(Subnet((40, 12, 0), kv_groups)):
            cached, uncached = (generate(model, tiny.token_ids(2, 8), use_cache=yes) for yes in (True, False))
        assert torch.equal(cached.sequences, uncached.sequences)
        assert_same_function(torch.stack(cached.logits), torch.stack(uncached.logits))

    def test_static_cache_equals_dynamic(self, model):
        dynamic, static = (
            generate(model, tiny.token_ids(2, 8), cache_implementation=kind) for kind in (None, "static")
        )
        assert_same_function(torch.stack(static.logits), torch.stack(dynamic.logits))

    def test_a_padded_row_equals_the_row_alone(self, model):
        rows = [tiny.token_ids(1, 9, seed=1), tiny.token_ids(1, 4, seed=2)]
        padded = torch.cat([rows[0], torch.cat([torch.zeros(1, 5, dtype=torch.long), rows[1]], 1)])
        together = generate(model, padded, attention_mask=(padded != 0).long())
        for row, tokens in enumerate(rows):
            alone = generate(model, tokens)
            assert torch.equal(together.sequences[row, 9:], alone.sequences[0, tokens.shape[1] :])
            assert_same_function(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0])

    def test_beam_search(self, model):
        cached, uncached = (
            generate(model, tiny.token_ids(2, 8), use_cache=yes, num_beams=2, output_scores=True)
            for yes in (True, False)
        )
        assert torch.equal(cached.sequences, uncached.sequences)
        assert_same_function(cached.sequences_scores, uncached.sequences_scores)

    def test_holds_the_kept_groups_only(self, model):
        filled = model(tiny.token_ids(2, 5), use_cache=True).past_key_values
        groups = model.search_space.kv_groups[-1]
        assert [layer.keys.shape[1] for layer in filled.layers[1:]] == [groups - 1, groups]
        assert filled.layers[0].keys.numel() == 2 * 5  # one number per token
        assert [filled.get_seq_length(layer) for layer in range(tiny.LAYERS)] == [5, 5, 5]


def generate(model: ElasticModel, tokens: torch.Tensor, **options):
    options = {"attention_mask": torch.ones_like(tokens), **options}
    return model.generate(
        tokens, max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )


def assert_gradient_of_prefix(sub, kept: int) -> None:
    units = sub.width.full
    rows = [(module.weight, module.matrix, module.stacked) for module in sub.opens]
    for weight, matrix, stacked in rows:
        if kept == 0:
            assert not weight.grad.any()  # zeros, as masking gives them
            continue
        grad_SUR = (weight.grad if matrix() is weight else weight.grad.t()).unflatten(0, (stacked, units, -1))
        assert (grad_SUR[:, kept:] == 0).all()
        assert (grad_SUR[:, :kept].abs().sum((0, 2, 3)) > 0).all()
    if kept:
        grad = sub.closes.weight.grad
        grad_DUC = (grad if sub.closes.matrix() is sub.closes.weight else grad.t()).unflatten(1, (units, -1))
        assert (grad_DUC[:, kept:] == 0).all()
        assert (grad_DUC[:, :kept].abs().sum((0, 2)) > 0).all()


def storages(model: ElasticModel) -> dict[str, int]:
    tensors = [*model.lm.named_parameters(), *model.lm.named_buffers()]
    return {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors}


class TestUse:
    """Choosing a sub-network is scoped."""

    def test_nests_and_restores(self, llama):
        space = llama.search_space
        assert llama.subnet == space.full
        with llama.use(space.uniform(20)) as same:
            assert same is llama
            with llama.use(space.smallest):
                assert llama.subnet == space.smallest
            assert llama.subnet == space.uniform(20)
        assert llama.subnet == space.full

    def test_restores_what_ran(self, llama, tokens):
        full = logits_of(llama, tokens)
        with llama.use(llama.search_space.uniform(20, 1)):
            narrow = logits_of(llama, tokens)
            with llama.use(llama.search_space.smallest):
                assert differs(logits_of(llama, tokens), narrow)
            assert torch.equal(logits_of(llama, tokens), narrow)
        assert torch.equal(logits_of(llama, tokens), full)

    @pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
    def test_restores_after_an_exception(self, llama, tokens, kind):
        full = logits_of(llama, tokens)
        with pytest.raises(kind), llama.use(llama.search_space.smallest):
            raise kind
        assert llama.subnet == llama.search_space.full
        assert torch.equal(logits_of(llama, tokens), full)

    def test_a_refused_subnet_changes_nothing(self, llama):
        half = llama.search_space.uniform(20)
        with llama.use(half):
            with (
                pytest.raises(SubnetError, match="neurons\\[0\\] is 21, not a choice"),
                llama.use(Subnet((21,) * 3, (1,) * 3)),
            ):
                pytest.fail("the block must not run")
            assert llama.subnet == half

    def test_models_do_not_share_their_choice(self, llama, plain_llama, tokens):
        other = ElasticModel(copy.deepcopy(plain_llama))
        full = logits_of(other, tokens)
        with llama.use(llama.search_space.smallest):
            assert other.subnet == other.search_space.full
            assert torch.equal(logits_of(other, tokens), full)

    def test_a_search_space_of_another_model_is_refused(self, plain_llama):
        message = r"this search space is for a model with .*'neurons': 48.*; this one has .*'neurons': 40"
        with pytest.raises(ValueError, match=message):
            ElasticModel(copy.deepcopy(plain_llama), search_space=SearchSpace(3, (0, 48), (0, 3)))

    def test_reads_through_to_the_model(self, llama):
        assert (llama.config, llama.device, llama.dtype) == (llama.lm.config, torch.device("cpu"), torch.float32)
