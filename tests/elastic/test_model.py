"""Choosing a sub-network: whatever ends the block, the model is as before."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tiny
from flextron.errors import FlextronError
from flextron.generation import stream
from flextron.inference.per_token import TokenWidths, use_token_widths
from flextron.model import ElasticModel


def test_ctrl_c_while_widths_are_set_leaves_the_model_as_it_was(llama, monkeypatch):
    kind = type(llama.layers[1].mlp)
    real = kind.keep

    def interrupted(sub, units):
        real(sub, units)
        if sub is llama.layers[1].mlp and not units:
            raise KeyboardInterrupt

    monkeypatch.setattr(kind, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt), llama.use(llama.search_space.smallest):
        pytest.fail("the block began")
    assert llama.subnet == llama.search_space.full
    assert all(sub.width.kept == sub.width.full for _, _, sub in llama.sub_layers())


REFUSED = "another thread runs this model as a sub-network now.* Load one model for each thread, or let a lock"


def in_thread(work):
    """What `work` returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


def use(model, subnet):
    with model.use(subnet):
        return model.subnet


def test_a_model_on_several_devices_is_refused_with_the_way_out():
    lm = tiny.plain_model("llama")
    add_hook_to_module(lm.model.layers[1].mlp.down_proj, ModelHook())  # as `device_map` does for every module
    with pytest.raises(TypeError, match=r"pass device instead of device_map.*larger than the memory.*rank --stream"):
        ElasticModel(lm)


class TestThreads:
    """A model has one choice of widths, which one thread makes at a time."""

    @pytest.mark.parametrize("call", ["use", "call", "lm", "generate", "per token"])
    def test_another_thread_is_refused_while_one_is_inside(self, llama, tokens, call):
        small, full = llama.search_space.smallest, llama.search_space.full
        widths = TokenWidths.of_rows(llama, [small])
        calls = {
            "use": lambda: use(llama, full),
            "call": lambda: llama(tokens),
            "lm": lambda: llama.lm(input_ids=tokens),
            "generate": lambda: llama.generate(tokens, max_new_tokens=1),
            "per token": lambda: use_token_widths(llama, widths).__enter__(),
        }
        for inside in (llama.use(small), use_token_widths(llama, widths)):
            with inside:
                before = llama(tokens).logits
                with pytest.raises(FlextronError, match=REFUSED):
                    in_thread(calls[call])
                assert torch.equal(llama(tokens).logits, before)
                with llama.use(small):  # again by this thread
                    pass
                with pytest.raises(FlextronError, match=REFUSED):
                    in_thread(calls[call])
        assert llama.subnet == full
        in_thread(calls[call])

    def test_widths_are_not_chosen_while_another_thread_runs_the_model(self, llama, tokens):
        entered, left = Event(), Event()

        def wait(*_):
            entered.set()
            assert left.wait(60)

        with llama.layers[1].module.register_forward_pre_hook(wait), ThreadPoolExecutor(1) as pool:
            running = pool.submit(llama, tokens)
            assert entered.wait(60)
            with pytest.raises(FlextronError, match=REFUSED):
                use(llama, llama.search_space.smallest)
            left.set()
            logits = running.result(60).logits
        assert torch.equal(logits, llama(tokens).logits)
        assert use(llama, llama.search_space.smallest) == llama.search_space.smallest

    def test_many_at_once_give_right_numbers_or_an_error(self, llama, tokens):
        subnets = [llama.search_space.smallest, llama.search_space.full, llama.search_space.uniform(20, 2)]
        expected = []
        for subnet in subnets:
            with llama.use(subnet):
                expected.append(llama(tokens).logits)

        def work(number):
            right = refused = 0
            for _ in range(20):
                try:
                    with llama.use(subnets[number]):
                        assert torch.allclose(llama(tokens).logits, expected[number], atol=1e-5)
                    right += 1
                except FlextronError:
                    refused += 1
            return right, refused

        with ThreadPoolExecutor(3) as pool:
            counts = list(pool.map(work, range(3)))
        assert sum(right for right, _ in counts) > 0
        assert all(sum(count) == 20 for count in counts)
        assert llama.subnet == llama.search_space.full

    def test_a_copy_is_free(self, llama, tokens):
        with llama.use(llama.search_space.smallest):
            lm = copy.deepcopy(llama.lm)
            in_thread(lambda: lm(input_ids=tokens))
        in_thread(lambda: lm(input_ids=tokens))

    @pytest.mark.parametrize("model_type", ["gpt2", "llama"])
    @pytest.mark.parametrize("drafts", [False, True])
    def test_a_stream_is_read_inside_use_and_by_any_thread_in_turn(self, model_type, drafts):
        """transformers' `generate` runs in a thread of the stream, which may do what its reader may."""
        words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(300)}, unk_token="w0"))  # noqa: S106
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        model = ElasticModel(tiny.plain_model(model_type, vocab_size=300), tokenizer)
        small, full = model.search_space.smallest, model.search_space.full
        options = {"max_new_tokens": 8, "fast": False, "speculative": small if drafts else None}
        expected = list(stream(model, "w3", **options))
        with model.use(small):
            assert list(stream(model, "w3", subnet=full, **options)) == expected
        pieces = stream(model, "w3", **options)
        assert [next(pieces), *in_thread(lambda: list(pieces))] == expected
        with model.use(small):
            with pytest.raises(FlextronError, match=REFUSED):
                in_thread(lambda: list(stream(model, "w3", subnet=full, **options)))
            begun = stream(model, "w3", subnet=full, **options)
            next(begun)
            with pytest.raises(FlextronError, match=REFUSED):
                in_thread(lambda: list(begun))
        assert list(stream(model, "w3", **options)) == expected
        assert model.subnet == full
