"""The chunked loss equals the plain one; hidden states and gradients equal those of masking, for every family."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny
from flextron.data.corpus import positions
from flextron.elastic import loss as loss_module
from flextron.elastic.loss import hidden_states, logits_of, losses
from flextron.errors import FlextronError
from flextron.model import ElasticModel
from flextron.subnet import Subnet
from flextron.training import distillation
from flextron.training.distillation import Distiller, check_teacher

END = 5  # the token that ends a document
CHANGES = {
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"final_logit_softcapping": 5.0},
    "gemma3_text": {"final_logit_softcapping": 5.0},
}
"""Config fields by which a family changes logits, with strong values."""


@pytest.fixture(scope="module", params=sorted(tiny.CONFIGS))
def plain(request):
    """A plain model of each family, never modified."""
    return tiny.plain_model(request.param, **CHANGES.get(request.param, {}))


@pytest.fixture
def model(plain) -> ElasticModel:
    return ElasticModel(copy.deepcopy(plain))


def subnets(model: ElasticModel) -> list[Subnet]:
    space = model.search_space
    return [space.full, *(tiny.random_subnet(space, seed) for seed in (1, 2)), space.uniform(20, 1)]


class TestFamilies:
    def test_logits_are_those_of_the_models_own_forward_pass(self, model):
        tokens = tiny.token_ids()
        for subnet in subnets(model):
            with model.use(subnet), torch.no_grad():
                hidden = hidden_states(model.lm, tokens, None)
                assert hidden.shape == (*tokens.shape, tiny.HIDDEN)
                tiny.assert_same_function(logits_of(model.lm, hidden), model(tokens).logits)

    def test_attention_stays_inside_documents(self, model):
        """Rows: two documents; three documents, the last of which ends with the row; and a single document."""
        tokens = tiny.token_ids(3, 16)
        tokens[tokens == END] = END + 1
        tokens[0, 6] = tokens[1, 2] = tokens[1, 3] = tokens[1, 15] = END
        documents = [(0, 0, 7), (0, 7, 16), (1, 0, 3), (1, 3, 4), (1, 4, 16), (2, 0, 16)]
        for subnet in subnets(model):
            with model.use(subnet), torch.no_grad():
                packed = hidden_states(model.lm, tokens, positions(tokens, END))
                for row, start, end in documents:
                    alone = hidden_states(model.lm, tokens[row : row + 1, start:end], None)
                    tiny.assert_same_function(packed[row : row + 1, start:end], alone)
                crossing = hidden_states(model.lm, tokens, None)
                if any(subnet.kv_groups):
                    assert tiny.differs(packed[0, 7:], crossing[0, 7:])

    def test_gradients_are_those_of_the_masked_model(self, plain, model):
        """Gradients of dropped units and sub-layers are zero, not missing; all others equal those of masking."""
        tokens, groups = tiny.token_ids(), model.search_space.kv_groups[-1]
        for subnet in [*subnets(model), Subnet((12, 0, 40), (1, groups, 0)), model.search_space.smallest]:
            expected = tiny.masked(plain, subnet, groups=groups).train()
            backward(expected, tokens)
            model.lm.train().zero_grad()
            with model.use(subnet):
                backward(model.lm, tokens)
            for layer, neurons, kv_groups in zip(model.layers, subnet.neurons, subnet.kv_groups, strict=True):
                assert_zero_outside(layer.module, layer.mlp, neurons)
                assert_zero_outside(layer.module, layer.attention, kv_groups)
            found = gradients(model.lm)
            for name, like in gradients(expected).items():
                if name in found and is_of_closing(model, name):  # with masking, its zeros would learn
                    like = like.where(found[name] != 0, 0)
                here = found.get(name, torch.zeros_like(like))  # a norm read only by a skipped sub-layer has none
                torch.testing.assert_close(here, like, rtol=1e-4, atol=1e-4, msg=f"{name}, {subnet}")

    def test_activations_computed_again_change_no_gradient(self, model):
        """The backward pass recomputes the same sub-network, whichever is in use by then."""
        lm, tokens = model.lm.train(), tiny.token_ids()
        compute_again = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
        tokens[0, 5] = END
        places = positions(tokens, END)
        for subnet in subnets(model):
            results = []
            for again in (False, True):
                if again:
                    compute_again()
                with model.use(subnet):
                    hidden = hidden_states(model.lm, tokens, places)
                    losses(model.lm, hidden, tokens, text_weight=1.0).total.backward()
                results.append(gradients(model.lm))
                model.lm.zero_grad()
            assert results[0].keys() == results[1].keys()
            for name, gradient in results[0].items():
                torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-4, msg=f"{name}, {subnet}")


def backward(lm, tokens: torch.Tensor) -> None:
    losses(lm, hidden_states(lm, tokens, None), tokens, text_weight=1.0).total.backward()


def gradients(lm: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def is_of_closing(model: ElasticModel, name: str) -> bool:
    return any(f".{axis.closes}." in name for axis in (model.family.mlp, model.family.attention))


def assert_zero_outside(layer: nn.Module, sub, kept: int) -> None:
    """Check that gradients exist, and are zero in rows and columns of dropped units and only there."""
    units = sub.width.full
    for name, parameter in layer.get_submodule(sub.axis.module).named_parameters():
        assert parameter.grad is not None, name
        assert kept or (parameter.grad == 0).all(), name
    for projection in sub.opens:
        grad = projection.weight.grad.t() if projection.transposed else projection.weight.grad
        grad_SUR = grad.unflatten(0, (projection.stacked, units, -1))
        assert (grad_SUR[:, kept:] == 0).all()
        assert (grad_SUR[:, :kept].abs().sum((0, 2, 3)) > 0).all()
        if projection.bias is not None:
            assert (projection.bias.grad.view(projection.stacked, units, -1)[:, kept:] == 0).all()
    grad = sub.closes.weight.grad.t() if sub.closes.transposed else sub.closes.weight.grad
    grad_DUC = grad.unflatten(1, (units, -1))
    assert (grad_DUC[:, kept:] == 0).all()
    assert (grad_DUC[:, :kept].abs().sum((0, 2)) > 0).all()


# The loss


@pytest.fixture
def teacher():
    """A model that differs from the student, so that no loss is zero."""
    return tiny.plain_model("llama", num_hidden_layers=2).requires_grad_(False)


@pytest.fixture
def student(llama) -> ElasticModel:
    llama.lm.train()
    return llama


class TestTeachersWithOtherRows:
    @pytest.mark.parametrize("rows", [tiny.VOCAB - 8, tiny.VOCAB + 8])
    def test_words_that_one_does_not_have_count_for_nothing(self, student, rows):
        """As with the shared rows alone, up to the student's own probability of the others."""
        teacher = tiny.plain_model("llama", vocab_size=rows).requires_grad_(False)
        tokens = tiny.token_ids(vocab=tiny.VOCAB - 8)
        shared = min(rows, tiny.VOCAB)
        p = teacher(tokens).logits[:, :-1, :shared].softmax(-1)
        log_q = student(tokens).logits[:, :-1].log_softmax(-1)[..., :shared]
        expected = (p * (p.log() - log_q)).sum()
        found = chunked_losses(student.lm, teacher, tokens, 0.5)[1]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)

    def test_the_tokenizers_tell_whether_tokens_are_the_same(self, student):
        teacher = ElasticModel(tiny.plain_model("llama", vocab_size=300), tiny.tokenizer())
        with pytest.raises(FlextronError, match="no tokenizer tells"):
            check_teacher(teacher, student, "big")
        student.tokenizer = tiny.tokenizer()
        check_teacher(teacher, student, "big")
        student.tokenizer = copy.deepcopy(tiny.tokenizer())
        student.tokenizer.add_tokens(["<new>"])
        with pytest.raises(FlextronError, match=r"300, the model one of 101, and their tokens differ"):
            check_teacher(teacher, student, "big")


def plain_losses(student, teacher, tokens_BT, text_weight: float):
    """Compute total, divergence and cross-entropy by definition, on whole tensors."""
    log_p = student(tokens_BT).logits[:, :-1].log_softmax(-1)
    cross_entropy = F.cross_entropy(log_p.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum")
    if teacher is None:
        return text_weight * cross_entropy, torch.zeros(()), cross_entropy
    p = teacher(tokens_BT).logits[:, :-1].softmax(-1).detach()
    divergence = (p * (p.log() - log_p)).sum()
    return (1 - text_weight) * divergence + text_weight * cross_entropy, divergence, cross_entropy


def chunked_losses(student, teacher, tokens_BT, text_weight: float):
    taught = None if teacher is None else hidden_states(teacher, tokens_BT, None)
    found = losses(
        student,
        hidden_states(student, tokens_BT, None),
        tokens_BT,
        teacher=teacher,
        teacher_hidden_BTD=taught,
        text_weight=text_weight,
    )
    return found.total, found.divergence, found.cross_entropy


class TestLosses:
    @pytest.mark.parametrize("chunk", [1, 7, 15, 30, 256])  # 30 tokens are predicted
    @pytest.mark.parametrize(("text_weight", "taught"), [(0.0, True), (0.3, True), (1.0, True), (1.0, False)])
    @pytest.mark.parametrize("head", ["frozen", "trained", "tied"])
    def test_equal_the_definition_with_its_gradients(
        self, student, teacher, monkeypatch, chunk, text_weight, taught, head
    ):
        monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
        if head == "tied":
            student.lm.get_output_embeddings().weight = student.lm.get_input_embeddings().weight
        if head == "frozen":
            student.lm.get_output_embeddings().requires_grad_(False)
        tokens, teacher = tiny.token_ids(), teacher if taught else None
        found, expected = [], []
        for compute, results in ((chunked_losses, found), (plain_losses, expected)):
            with student.use(student.search_space.uniform(20, 2)):
                total, divergence, cross_entropy = compute(student.lm, teacher, tokens, text_weight)
                (total / 7).backward()  # a gradient that is not 1
            results += [[value.detach() for value in (total, divergence, cross_entropy)], gradients(student.lm)]
            student.lm.zero_grad()
        for value, like in zip(found[0], expected[0], strict=True):
            assert value.item() == pytest.approx(like.item(), rel=1e-5, abs=1e-5)
        assert found[1].keys() == expected[1].keys()
        assert ("lm_head.weight" in found[1]) is (head == "trained")
        for name, like in expected[1].items():
            torch.testing.assert_close(found[1][name], like, rtol=1e-5, atol=1e-5, msg=name)

    def test_only_the_total_has_a_gradient(self, student, teacher):
        total, divergence, cross_entropy = chunked_losses(student.lm, teacher, tiny.token_ids(), 0.5)
        assert total.requires_grad
        assert not divergence.requires_grad
        assert not cross_entropy.requires_grad

    def test_no_gradient_to_the_teacher(self, student, teacher):
        """No gradient reaches the teacher, even if its weights require one."""
        teacher.requires_grad_(True)
        chunked_losses(student.lm, teacher, tiny.token_ids(), 0.5)[0].backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert any(parameter.grad is not None for parameter in student.lm.parameters())

    def test_nothing_to_differentiate(self, student, teacher):
        with torch.no_grad():
            found = chunked_losses(student.lm, teacher, tiny.token_ids(), 0.5)
        expected = plain_losses(student.lm, teacher, tiny.token_ids(), 0.5)
        assert [value.item() for value in found] == pytest.approx([value.item() for value in expected], rel=1e-5)
        assert not found[0].requires_grad

    @pytest.mark.parametrize("held_out", [False, True])
    def test_logits_of_a_chunk_only(self, student, teacher, monkeypatch, held_out):
        """Student and teacher never have logits of more tokens, in the forward or the backward pass."""
        monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
        seen = []
        for lm in (student.lm, teacher):
            lm.get_output_embeddings().register_forward_hook(lambda _module, _inputs, out: seen.append(out.numel()))
        distiller = Distiller(student.lm, teacher, text_weight=0.5)
        found = distiller(tiny.token_ids(4), held_out=held_out)
        found.total.backward()
        assert max(seen) == 8 * tiny.VOCAB
        assert sum(seen) == 4 * (tiny.TIME - 1) * tiny.VOCAB * (1 if held_out else 2)

    def test_nothing_of_the_size_of_all_logits_is_kept_for_backward(self, student, teacher, monkeypatch):
        monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
        tokens, kept = tiny.token_ids(2, 60), []
        hidden = hidden_states(student.lm, tokens, None).detach().requires_grad_(True)
        taught = hidden_states(teacher, tokens, None)

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses(student.lm, hidden, tokens, teacher=teacher, teacher_hidden_BTD=taught)
        assert 8 * tiny.VOCAB <= max(kept) <= tokens.numel() * tiny.HIDDEN + student.lm.lm_head.weight.numel()
        assert max(kept) < tokens.numel() * tiny.VOCAB


class TestDistiller:
    def test_documents_are_kept_apart_in_student_and_teacher(self, student, teacher):
        """Two documents in a row have the losses that they have alone, except for the step from one to the other."""
        tokens = tiny.token_ids(1, 20)
        tokens[tokens == END] = END + 1
        tokens[0, 8] = END
        packed = Distiller(student.lm, teacher, text_weight=0.5, document_end=END)
        alone = Distiller(student.lm, teacher, text_weight=0.5)
        both, first, second = packed(tokens), alone(tokens[:, :9]), alone(tokens[:, 9:])
        at_end = alone(tokens[:, :10])  # the end of the first predicts the start of the second
        for name in ("divergence", "cross_entropy", "total"):
            value = {
                part: getattr(found, name).item()
                for part, found in zip("bfse", (both, first, second, at_end), strict=True)
            }
            assert value["b"] == pytest.approx(value["e"] + value["s"], rel=1e-5)
        assert both.total.item() != pytest.approx(alone(tokens).total.item(), rel=1e-3)

    def test_rows_without_an_end_inside_need_no_positions(self, student, monkeypatch):
        seen = []
        monkeypatch.setattr(
            distillation,
            "hidden_states",
            lambda lm, tokens, places: seen.append(places) or hidden_states(lm, tokens, None),
        )
        tokens = tiny.token_ids()
        tokens[tokens == END] = END + 1
        tokens[:, -1] = END
        Distiller(student.lm, text_weight=1.0, document_end=END)(tokens)
        assert seen == [None]

    def test_held_out_is_what_evaluate_measures(self, student, teacher):
        from flextron.evaluation import evaluate

        blocks, subnet = tiny.blocks(4), student.search_space.uniform(20, 2)
        distiller = Distiller(student.lm, teacher, text_weight=0.0, document_end=int(blocks.tokens[0, 3]))
        with student.use(subnet), torch.no_grad():
            found = distiller(blocks.tokens, held_out=True).cross_entropy.item()
        expected = evaluate(student, [subnet], blocks)[0].nats_per_token
        assert found / blocks.predicted_tokens == pytest.approx(expected, rel=1e-5)

    def test_a_student_that_teaches_itself(self, student):
        """`original` wraps only the teacher's pass."""
        original = copy.deepcopy(student.lm)
        weight = student.lm.model.layers[0].mlp.down_proj.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)

        @contextmanager
        def as_it_was():
            after = weight.detach().clone()
            weight.data.copy_(before)
            yield
            weight.data.copy_(after)

        tokens = tiny.token_ids()
        found = Distiller(student.lm, original=as_it_was)(tokens)
        expected = plain_losses(student.lm, original, tokens, 0.0)
        assert found.divergence.item() > 0.01
        assert found.divergence.item() == pytest.approx(expected[1].item(), rel=1e-4)
