"""Adapters: nested as the weights are, invisible when new, off or merged."""

import copy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from flextron.elastic.adapters import add_adapters, merge_adapters, without_adapters
from flextron.errors import FlextronError
from flextron.model import ElasticModel
from tiny import assert_same_function, differs, logits_of, masked

RANK, ALPHA = 4, 6.0


def subnets(model: ElasticModel) -> list:
    """Full, uneven with skipped MLPs and attentions, and the smallest."""
    space = model.search_space
    groups, half = space.kv_groups[-1], space.neurons[len(space.neurons) // 2]
    skips = tiny.random_subnet(space, 1, neurons=(half, 0, half), kv_groups=(0, groups - 1, groups))
    return [space.full, tiny.random_subnet(space, 0), skips, space.smallest]


def logits_of_each(model: ElasticModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Logits of each of `subnets`."""
    results = []
    for subnet in subnets(model):
        with model.use(subnet):
            results.append(logits_of(model, tokens))
    return results


def all_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@torch.no_grad()
def add_random_adapters(model: ElasticModel) -> None:
    """Adapters as after some training: A and B are random, and large enough to be seen."""
    add_adapters(model, rank=RANK, alpha=ALPHA)
    draw = torch.Generator().manual_seed(3)
    for name, matrix in adapter_matrices(model.lm).items():
        matrix.copy_(torch.randn(matrix.shape, generator=draw) * (0.15 if "lora_A" in name else 0.3))


def adapter_matrices(lm) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in lm.named_parameters() if "lora_" in name}


@torch.no_grad()
def plain_with_adapters(plain, model: ElasticModel):
    """A copy of the plain model with (alpha / R) B A added to its weights: what merging means."""
    result, matrices = copy.deepcopy(plain), adapter_matrices(model.lm)
    for name, a_RI in matrices.items():
        if "lora_A" in name:
            weight = result.get_submodule(name.partition(".lora_A")[0]).weight
            delta_OI = matrices[name.replace("lora_A", "lora_B")] @ a_RI * (ALPHA / RANK)
            weight.add_(delta_OI.t() if plain.config.model_type == "gpt2" else delta_OI)
    return result


def shape_of(lm) -> dict[str, tuple]:
    """Every module: which object, of which class, with which attributes; every parameter: which one, where."""
    modules = {name: (id(module), type(module), sorted(vars(module))) for name, module in lm.named_modules()}
    parameters = {
        name: (id(parameter), parameter.data_ptr(), parameter.requires_grad)
        for name, parameter in lm.named_parameters()
    }
    return {**modules, **parameters}


class TestContract:
    def test_new_adapters_change_nothing(self, model, tokens):
        before = logits_of_each(model, tokens)
        share, subnet = model.share(subnets(model)[1]), model.subnet
        add_adapters(model, rank=RANK)
        assert all_equal(logits_of_each(model, tokens), before)
        assert (model.share(subnets(model)[1]), model.subnet) == (share, subnet)

    def test_only_adapters_are_trainable_one_for_every_elastic_projection(self, model):
        add_adapters(model, rank=RANK)
        trainable = {name for name, parameter in model.lm.named_parameters() if parameter.requires_grad}
        assert trainable == set(adapter_matrices(model.lm))
        adapted = {name.partition(".lora_")[0] for name in trainable}
        axes = (model.family.mlp, model.family.attention)
        paths = [path for axis in axes for path in (*axis.opens, axis.closes)]
        assert adapted == {f"{model.family.layers}.{layer}.{path}" for layer in range(tiny.LAYERS) for path in paths}
        assert len(trainable) == 2 * len(adapted)

    def test_narrowed_equals_masking_the_merged(self, plain, model, tokens):
        add_random_adapters(model)
        merged = plain_with_adapters(plain, model)
        groups = model.search_space.kv_groups[-1]
        for subnet, logits in zip(subnets(model), logits_of_each(model, tokens), strict=True):
            assert_same_function(logits, logits_of(masked(merged, subnet, groups=groups), tokens))
        assert differs(logits_of(model, tokens), logits_of(plain, tokens))

    def test_without_adapters_the_original_runs(self, model, tokens):
        original = logits_of_each(model, tokens)
        add_random_adapters(model)
        adapted = logits_of_each(model, tokens)
        with without_adapters(model):
            assert all_equal(logits_of_each(model, tokens), original)
        assert all_equal(logits_of_each(model, tokens), adapted)

    def test_merging_keeps_the_function(self, model, tokens):
        add_random_adapters(model)
        adapted = logits_of_each(model, tokens)
        merge_adapters(model)
        for logits, expected in zip(logits_of_each(model, tokens), adapted, strict=True):
            assert_same_function(logits, expected)

    def test_merging_leaves_modules_as_before(self, model):
        model.lm.get_input_embeddings().weight.requires_grad_(False)
        before, keys = shape_of(model.lm), list(model.lm.state_dict())
        attributes = list(vars(model.lm))
        add_random_adapters(model)
        merge_adapters(model)
        assert shape_of(model.lm) == before
        assert list(model.lm.state_dict()) == keys
        assert list(vars(model.lm)) == attributes

    def test_a_merged_model_is_saved_as_a_plain_one(self, model, tokens, tmp_path):
        add_random_adapters(model)
        merge_adapters(model)
        model.save_pretrained(tmp_path / "saved")
        as_plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(logits_of(as_plain, tokens), logits_of(model, tokens))
        loaded = ElasticModel.from_pretrained(tmp_path / "saved")
        assert all_equal(logits_of_each(loaded, tokens), logits_of_each(model, tokens))

    def test_only_the_units_that_run_have_gradients(self, model, tokens):
        groups = model.search_space.kv_groups[-1]
        neurons, kv_groups = (12, 0, 40), (1, groups, 0)
        add_random_adapters(model)
        with model.use(tiny.random_subnet(model.search_space, 0, neurons=neurons, kv_groups=kv_groups)):
            model(tokens, labels=tokens).loss.backward()
        for layer, *kept in zip(model.layers, neurons, kv_groups, strict=True):
            for sub, units in zip((layer.mlp, layer.attention), kept, strict=True):
                assert_gradient_of_prefix(model, layer.module, sub, units)
        assert all(p.grad is None for p in model.lm.parameters() if not p.requires_grad)


def assert_gradient_of_prefix(model: ElasticModel, layer, sub, kept: int) -> None:
    opening = [layer.get_submodule(path) for path in sub.axis.opens]
    closing = layer.get_submodule(sub.axis.closes)
    if kept == 0:
        matrices = [matrix for adapter in (*opening, closing) for matrix in adapter_matrices(adapter).values()]
        assert all(not matrix.grad.any() for matrix in matrices)  # zeros, as masking gives them
        return
    units = sub.width.full
    grads_UX = [
        adapter.lora_B["default"].weight.grad.unflatten(0, (sub.axis.stacked, units, -1)).transpose(0, 1).flatten(1)
        for adapter in opening
    ]
    grads_UX.append(closing.lora_A["default"].weight.grad.t().unflatten(0, (units, -1)).flatten(1))
    for grad_UX in grads_UX:
        assert (grad_UX[kept:] == 0).all()
        assert (grad_UX[:kept].abs().sum(1) > 0).all()
    shared = [*(adapter.lora_A["default"] for adapter in opening), closing.lora_B["default"]]
    assert all(matrix.weight.grad.abs().sum() > 0 for matrix in shared)


class TestTraining:
    """One family is enough from here on."""

    def test_a_teacher_between_forward_and_backward_changes_no_gradient(self, llama, tokens):
        add_random_adapters(llama)
        gradients = []
        for with_teacher in (False, True):
            llama.lm.zero_grad()
            with llama.use(llama.search_space.uniform(20, 2)):
                loss = llama(tokens, labels=tokens).loss
                if with_teacher:
                    with without_adapters(llama), torch.no_grad():
                        llama(tokens)
                loss.backward()
            gradients.append([matrix.grad.clone() for matrix in adapter_matrices(llama.lm).values()])
        assert all_equal(*gradients)

    def test_gradient_checkpointing_changes_no_gradient(self, llama, tokens):
        add_random_adapters(llama)
        llama.lm.train()
        gradients = []
        for checkpointing in (False, True):
            llama.lm.zero_grad()
            if checkpointing:
                llama.lm.activation_checkpointing_enable()
            with llama.use(llama.search_space.uniform(20, 2)):
                llama(tokens, labels=tokens).loss.backward()
            gradients.append([matrix.grad.clone() for matrix in adapter_matrices(llama.lm).values()])
        for once, again in zip(*gradients, strict=True):
            torch.testing.assert_close(once, again)

    def test_steps_fit_and_can_be_merged(self, llama, plain_llama, tokens):
        add_adapters(llama, rank=RANK)
        frozen = {name: p.clone() for name, p in llama.lm.named_parameters() if not p.requires_grad}
        adam = torch.optim.Adam([p for p in llama.lm.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        with llama.use(llama.search_space.uniform(20, 2)):
            for _ in range(5):
                losses.append(llama(tokens, labels=tokens).loss)
                adam.zero_grad()
                losses[-1].backward()
                adam.step()
            assert losses[-1] < losses[0] - 0.1
            assert all(torch.equal(p, frozen[name]) for name, p in llama.lm.named_parameters() if name in frozen)
            adapted = logits_of(llama, tokens)
            merge_adapters(llama)
            assert_same_function(logits_of(llama, tokens), adapted)

    def test_cached_equals_uncached(self, llama, tokens):
        add_random_adapters(llama)
        with llama.use(llama.search_space.uniform(20, 2)):
            cached, uncached = (
                llama.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=yes) for yes in (True, False)
            )
        assert torch.equal(cached, uncached)


class TestAdding:
    def test_the_seed_decides(self, plain_llama):
        drawn = []
        for seed in (1, 1, 2):
            model = ElasticModel(copy.deepcopy(plain_llama))
            add_adapters(model, rank=RANK, seed=seed)
            drawn.append([matrix for name, matrix in adapter_matrices(model.lm).items() if "lora_A" in name])
        assert all_equal(drawn[0], drawn[1])
        assert not any(torch.equal(one, other) for one, other in zip(drawn[0], drawn[2], strict=True))

    @pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, 0.5), (10.0, 2.5)])
    def test_alpha_scales(self, llama, alpha, scale):
        before = llama.layers[0].mlp.closes.weight.clone()
        add_adapters(llama, rank=RANK, alpha=alpha)
        adapter = llama.lm.get_submodule("model.layers.0.mlp.down_proj")
        torch.nn.init.ones_(adapter.lora_B["default"].weight)
        delta = scale * adapter.lora_A["default"].weight.sum(0)
        merge_adapters(llama)
        torch.testing.assert_close(llama.layers[0].mlp.closes.weight, before + delta)

    def test_adapters_of_16_bit_weights_are_float32(self, plain_llama, tokens):
        model = ElasticModel(copy.deepcopy(plain_llama).bfloat16())
        original = logits_of_each(model, tokens)
        add_adapters(model, rank=RANK)
        assert {matrix.dtype for matrix in adapter_matrices(model.lm).values()} == {torch.float32}
        assert all_equal(logits_of_each(model, tokens), original)
        model(tokens, labels=tokens).loss.backward()
        merge_adapters(model)
        assert {parameter.dtype for parameter in model.lm.parameters()} == {torch.bfloat16}
        assert all_equal(logits_of_each(model, tokens), original)

    def test_can_be_repeated_after_merging(self, llama, tokens):
        add_random_adapters(llama)
        merge_adapters(llama)
        once = logits_of(llama, tokens)
        add_random_adapters(llama)
        with without_adapters(llama):
            assert torch.equal(logits_of(llama, tokens), once)

    def test_a_copy_has_adapters_of_its_own(self, llama, tokens):
        add_random_adapters(llama)
        other = copy.deepcopy(llama)
        adapted = logits_of_each(llama, tokens)
        assert all_equal(logits_of_each(other, tokens), adapted)
        merge_adapters(other)
        assert all_equal(logits_of_each(llama, tokens), adapted)

    @pytest.mark.parametrize("rank", [0, -1])
    def test_a_rank_below_1_is_refused(self, llama, rank):
        with pytest.raises(ValueError, match=f"rank {rank} is below 1, .* Try 16"):
            add_adapters(llama, rank=rank)

    @pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
    def test_an_alpha_that_is_not_positive_is_refused(self, llama, alpha):
        with pytest.raises(ValueError, match=f"alpha {alpha} is not a positive number. Leave it out for 4"):
            add_adapters(llama, rank=RANK, alpha=alpha)

    def test_twice_is_refused(self, llama, tokens):
        add_random_adapters(llama)
        adapted = logits_of(llama, tokens)
        with pytest.raises(FlextronError, match=r"has adapters already\. Call merge_adapters first"):
            add_adapters(llama, rank=RANK)
        assert torch.equal(logits_of(llama, tokens), adapted)

    def test_peft_is_named_when_missing(self, llama, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(FlextronError, match=r'adapters need PEFT .* pip install "flextron\[lora\]"'):
            add_adapters(llama, rank=RANK)
        assert all(parameter.requires_grad for parameter in llama.lm.parameters())


class TestWithout:
    def test_nests(self, llama, tokens):
        original = logits_of(llama, tokens)
        add_random_adapters(llama)
        with without_adapters(llama):
            with without_adapters(llama):
                pass
            assert torch.equal(logits_of(llama, tokens), original)
        assert differs(logits_of(llama, tokens), original)

    def test_restores_after_an_exception(self, llama, tokens):
        add_random_adapters(llama)
        adapted = logits_of(llama, tokens)
        with pytest.raises(KeyboardInterrupt), without_adapters(llama):
            raise KeyboardInterrupt
        assert torch.equal(logits_of(llama, tokens), adapted)
        assert all(matrix.requires_grad for matrix in adapter_matrices(llama.lm).values())

    def test_needs_adapters(self, llama):
        with pytest.raises(FlextronError, match=r"has no adapters\. Call add_adapters first"), without_adapters(llama):
            pytest.fail("the block must not run")


class TestMerging:
    def test_needs_adapters(self, llama):
        with pytest.raises(FlextronError, match=r"has no adapters\. Call add_adapters first"):
            merge_adapters(llama)

    def test_refuses_what_is_not_finite_and_merges_nothing(self, llama, tokens):
        original = logits_of(llama, tokens)
        add_random_adapters(llama)
        with torch.no_grad():
            llama.lm.get_submodule("model.layers.2.mlp.up_proj").lora_B["default"].weight[0, 0] = float("nan")
        with pytest.raises(FlextronError, match=r"adapter of model\.layers\.2\.mlp\.up_proj .* not finite"):
            merge_adapters(llama)
        with without_adapters(llama):
            assert torch.equal(logits_of(llama, tokens), original)
