"""Writing ahead with a nested sub-network: the greedy text of the model alone, from one set of weights."""

import re
from dataclasses import replace

import pytest
import torch

import tiny
from flextron import cli
from flextron.commands import shared
from flextron.data.blocks import load_blocks
from flextron.demo.quickstart import smollm2_path
from flextron.elastic.adapters import add_adapters
from flextron.elastic.checkpoint import quiet_transformers
from flextron.errors import SubnetError
from flextron.generation import compare_speculative, generate
from flextron.inference.decoder import Decoder
from flextron.inference.speculative import Draft, assisted_tokens, draft_model, stream_speculative
from flextron.inference.streaming import can_stream, stream_tokens
from flextron.model import ElasticModel
from flextron.ranking.importance import rank
from flextron.subnet import Subnet

NEW = 20


@pytest.fixture(autouse=True, scope="module")
def quiet():
    quiet_transformers()


def drafts(model):
    """Narrow, hardly narrowed (so that much is accepted), and with nothing but skipped sub-layers."""
    space = model.search_space
    return tiny.random_subnet(space, seed=3), space.uniform(space.neurons[-2]), space.smallest


def greedy(model, prompt, **options):
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), **{"max_new_tokens": NEW, "do_sample": False, **options}
    )
    return output[0, prompt.shape[1] :].tolist()


def test_assisted_generation_of_transformers_gives_the_greedy_text(model):
    full = model.search_space.full
    for seed, subnet in enumerate(drafts(model)):
        prompt = tiny.token_ids(1, 9, seed=seed)
        draft = Draft(subnet, 3)
        assert list(assisted_tokens(model, full, draft, prompt, max_new_tokens=NEW)) == greedy(model, prompt)
        assert draft.written == NEW == draft.accepted + draft.passes
        assert draft.accepted <= draft.drafted <= 3 * draft.passes
        assert model.subnet == full


@pytest.fixture(params=["llama", "qwen3"])
def streaming(request):
    """A model that `Decoder` takes."""
    return ElasticModel(tiny.plain_model(request.param, vocab_size=300), tiny.tokenizer())


def test_our_loop_gives_the_greedy_text(streaming):
    space = streaming.search_space
    assert can_stream(streaming)
    accepted = 0
    for seed, subnet in enumerate(drafts(streaming)):
        for target in (space.full, space.uniform(38)):
            prompt = tiny.token_ids(1, 9, seed=seed)
            plain = list(stream_tokens(streaming, target, prompt, max_new_tokens=NEW))
            for tokens in (1, 2, 5):
                if streaming.layer_weights(subnet) < streaming.layer_weights(target):
                    draft = Draft(subnet, tokens)
                    found = stream_speculative(streaming, target, draft, prompt, max_new_tokens=NEW)
                    assert list(found) == plain
                    assert draft.written == NEW == 1 + draft.accepted + draft.passes
                    assert draft.accepted <= draft.drafted <= tokens * draft.passes
                    accepted += draft.accepted
    assert accepted


def test_our_loop_in_two_threads(llama):
    torch.set_num_threads(2)  # `thread_count` of conftest sets it back
    prompt, draft = tiny.token_ids(1, 9), Draft(drafts(llama)[1], 3)
    plain = list(stream_tokens(llama, llama.subnet, prompt, max_new_tokens=NEW))
    assert list(stream_speculative(llama, llama.subnet, draft, prompt, max_new_tokens=NEW)) == plain
    assert draft.accepted


def test_both_ways_end_at_a_stop_token(streaming):
    prompt, full, (_, near, _) = tiny.token_ids(1, 9, seed=1), streaming.search_space.full, drafts(streaming)
    for at in (0, 3, 4, 7):
        stop = greedy(streaming, prompt)[at]
        expected = greedy(streaming, prompt, eos_token_id=stop)
        assert expected[-1] == stop
        ours = stream_speculative(streaming, full, Draft(near, 3), prompt, max_new_tokens=NEW, stop=[stop])
        assert list(ours) == expected
        theirs = assisted_tokens(streaming, full, Draft(near, 3), prompt, max_new_tokens=NEW, eos_token_id=stop)
        assert list(theirs) == expected


@pytest.mark.parametrize("length", [1, 2, 3])
def test_never_more_tokens_than_asked_for(streaming, length):
    prompt, (_, near, _) = tiny.token_ids(1, 9), drafts(streaming)
    draft = Draft(near, 6)
    ours = list(stream_speculative(streaming, streaming.subnet, draft, prompt, max_new_tokens=length))
    theirs = list(assisted_tokens(streaming, streaming.subnet, Draft(near, 6), prompt, max_new_tokens=length))
    assert ours == theirs == greedy(streaming, prompt, max_new_tokens=length)
    assert draft.drafted < length


def test_several_steps_together_are_the_same_steps_one_by_one(streaming):
    tokens = tiny.token_ids(1, 12)[0].tolist()
    for subnet in (streaming.subnet, *drafts(streaming)):
        one, many = (Decoder(streaming, subnet, max_tokens=12) for _ in range(2))
        expected = torch.stack([one.step(token).clone() for token in tokens])
        torch.testing.assert_close(torch.cat([many.steps(tokens[:7]), many.steps(tokens[7:])]), expected)
        many.rewind(5)
        torch.testing.assert_close(many.steps(tokens[5:]), expected[5:])
        with pytest.raises(ValueError, match="14 tokens do not fit into a Decoder made for 12"):
            many.steps([1, 2])
        with pytest.raises(ValueError, match="cannot go back to 13 tokens; 12 were seen"):
            many.rewind(13)
        with pytest.raises(ValueError, match="got no tokens"):
            many.steps([])


def test_a_draft_has_no_weights_of_its_own(model):
    before = {id(parameter) for parameter in model.lm.parameters()}
    draft = draft_model(model, drafts(model)[0])
    weights = list(draft.parameters())
    assert {id(parameter) for parameter in weights} == before
    assert {weight.data_ptr() for weight in weights} == {weight.data_ptr() for weight in model.lm.parameters()}
    assert draft.num_parameters() == model.lm.num_parameters()


def test_a_draft_computes_its_sub_network_and_leaves_the_model_as_it_is(model, tokens):
    subnet = drafts(model)[0]
    draft = draft_model(model, subnet)
    expected = tiny.logits_of(model, tokens)
    with model.use(subnet):
        narrow = tiny.logits_of(model, tokens)
    assert torch.equal(tiny.logits_of(draft, tokens), narrow)
    assert torch.equal(tiny.logits_of(model, tokens), expected)
    draft.generation_config.num_assistant_tokens = 99
    assert model.lm.generation_config.num_assistant_tokens != 99


def test_sub_networks_with_adapters_draft_too(llama):
    pytest.importorskip("peft")
    add_adapters(llama, rank=2)
    for name, parameter in llama.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    prompt, (narrow, near, _) = tiny.token_ids(1, 9), drafts(llama)
    assert not can_stream(llama)
    for subnet in (narrow, near):
        found = assisted_tokens(llama, llama.subnet, Draft(subnet, 3), prompt, max_new_tokens=NEW)
        assert list(found) == greedy(llama, prompt)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_generate_takes_a_draft_and_counts(model_type, capsys):
    model = ElasticModel(tiny.plain_model(model_type, vocab_size=300), tiny.tokenizer())
    draft = Draft(drafts(model)[1], 2)
    text = generate(model, "The quick", max_new_tokens=NEW, stream=True, speculative=draft)
    assert capsys.readouterr().out.strip() == text.strip()
    for fast in (True, False):
        for speculative in (None, replace(draft), draft.subnet):
            assert generate(model, "The quick", max_new_tokens=NEW, fast=fast, speculative=speculative) == text
    assert draft.written == NEW
    speed_up, equal = compare_speculative(model, "The quick", draft, max_new_tokens=NEW)
    assert speed_up > 0
    assert equal
    assert draft.written == NEW


def test_what_the_generation_config_asks_for_holds_for_drafts(llama):
    llama.lm.generation_config.update(repetition_penalty=1.5)
    prompt = tiny.token_ids(1, 9)
    plain = greedy(llama, prompt)
    found = assisted_tokens(llama, llama.subnet, Draft(drafts(llama)[1]), prompt, max_new_tokens=NEW)
    assert list(found) == plain
    llama.lm.generation_config.update(repetition_penalty=1.0)
    assert greedy(llama, prompt) != plain


def test_errors_name_the_limit_and_the_way_out(streaming):
    space, prompt = streaming.search_space, tiny.token_ids(1, 5)
    narrow = space.uniform(20)
    for writes in (assisted_tokens, stream_speculative):
        for target, draft in ((space.full, space.full), (narrow, space.uniform(22))):
            with pytest.raises(ValueError, match=r"the draft keeps .*; name a smaller draft"):
                list(writes(streaming, target, Draft(draft), prompt, max_new_tokens=4))
        with pytest.raises(ValueError, match="got 2 prompts; speculative decoding goes on from one"):
            list(writes(streaming, space.full, Draft(narrow), tiny.token_ids(2, 5), max_new_tokens=4))
        with pytest.raises(SubnetError, match="for a model of 1 layers"):
            list(writes(streaming, space.full, Draft(Subnet((8,), (1,))), prompt, max_new_tokens=4))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        next(stream_speculative(streaming, space.full, Draft(narrow), prompt, max_new_tokens=0))
    with pytest.raises(ValueError, match="a draft of 0 tokens; write 1 or more ahead"):
        Draft(narrow, 0)
    with pytest.raises(ValueError, match="temperature 0"):
        generate(streaming, "Hi", temperature=0.5, speculative=narrow)
    with pytest.raises(SubnetError):
        draft_model(streaming, Subnet((8,), (1,)))


def test_the_command_prints_the_same_text_and_what_came_of_the_draft(checkpoint, capsys):
    arguments = ["generate", str(checkpoint), "The quick", "--max-new-tokens", "12"]
    assert cli.main(arguments) == 0
    plain = capsys.readouterr().out
    asked = ["--speculative", "neurons=38", "--draft-tokens", "3", "--compare"]
    assert cli.main([*arguments, *asked]) == 0
    out, err = capsys.readouterr()
    assert out == plain
    assert re.search(r"note: accepted \d+ of \d+ drafted tokens \(\d+%\), \d\.\d\d tokens a pass; [\d.]+ tokens/s", err)
    assert re.search(r"note: [\d.]+ times as fast as plain greedy decoding, the same text", err)
    assert cli.main([*arguments, "--speculative", "neurons=40"]) == 2
    assert "name a smaller draft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speculative", "12"], "'12' has no unit"),
        (["--speculative", "0.5x", "--temperature", "1"], "greedy text"),
        (["--speculative", "0.5x", "--budget", "1x", "--per-token"], "leave out --per-token"),
        (["--speculative", "0.5x", "--draft-tokens", "0"], "--draft-tokens is 0; it must be at least 1"),
        (["--compare"], "--compare needs --speculative"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(options, message, capsys, monkeypatch):
    monkeypatch.setattr(shared, "load", lambda config: pytest.fail("loads"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "m", "p", *options])
    assert stop.value.code == 2
    assert message in " ".join(re.sub("[─-╿]", " ", capsys.readouterr().err).split())


@pytest.mark.real
@pytest.mark.slow
def test_fifty_texts_of_smollm2_are_those_of_plain_decoding():
    model = ElasticModel.from_pretrained(smollm2_path(), dtype=torch.float32)
    rank(model, load_blocks(model.tokenizer, "sample/train", tokens=2048))
    full, draft = model.search_space.full, Draft(model.search_space.uniform(1280), 4)
    stop = {model.lm.generation_config.eos_token_id}
    blocks = load_blocks(model.tokenizer, "sample/validation", tokens=50 * 64, block_tokens=64)
    for row in range(50):
        prompt = blocks.tokens[row : row + 1, : 8 + row]
        plain = list(stream_tokens(model, full, prompt, max_new_tokens=32, stop=stop))
        ours = list(stream_speculative(model, full, draft, prompt, max_new_tokens=32, stop=stop))
        assert ours == plain
        if row < 5:
            assert list(assisted_tokens(model, full, Draft(draft.subnet), prompt, max_new_tokens=32)) == plain
    assert draft.acceptance > 0.3
