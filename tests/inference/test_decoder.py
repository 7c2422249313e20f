"""Fast decoding gives the logits and text of transformers for every supported model, and refuses all others."""

import copy
import itertools
import subprocess
import sys
from functools import cache

import pytest
import torch

import tiny
from flextron.elastic.adapters import add_adapters
from flextron.errors import SubnetError
from flextron.generation import generate
from flextron.inference import decoder as decoding
from flextron.inference.decoder import Decoder, supports
from flextron.inference.lean.angles import Angles
from flextron.inference.streaming import can_stream, stream_tokens
from flextron.model import ElasticModel
from flextron.subnet import Subnet

PROMPT, STEPS = 7, 5
VOCAB = 303  # more than the tokenizer's 300


def rope(kind, **settings):
    settings = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8, **settings}
    return {"rope_parameters": {"rope_type": kind, **settings}}


SUPPORTED = {
    "llama": ("llama", {}),
    "llama, gelu, tied, llama3 rope": (
        "llama",
        {
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
            **rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
        },
    ),
    "llama, no biases, yarn rope": ("llama", {"attention_bias": False, "mlp_bias": False, **rope("yarn")}),
    "mistral, sliding window": ("mistral", {}),
    "qwen2, sliding window in some layers": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "smollm3, no rope in some layers": ("smollm3", {}),
    "granite": ("granite", {}),
    "gemma2, norms before and after, caps": ("gemma2", {}),
    "gemma3, two kinds of angles": ("gemma3_text", {}),
    "phi, side by side, no gate, LayerNorms": ("phi", {}),
}


@cache
def plain(name):
    model_type, changes = SUPPORTED[name]
    return tiny.plain_model(model_type, vocab_size=VOCAB, **changes)


@pytest.fixture(params=SUPPORTED)
def model(request):
    return ElasticModel(copy.deepcopy(plain(request.param)), tiny.tokenizer())


@pytest.fixture
def llama():
    return ElasticModel(copy.deepcopy(plain("llama")), tiny.tokenizer())


def subnets(model):
    """Sub-networks: full, narrowed, uneven, some sub-layers skipped (the first layer's too), all skipped."""
    space = model.search_space
    skipping = Subnet((0, 40, 6), (3, 0, 1)), Subnet((8, 0, 40), (0, 2, 0))
    return [space.full, space.uniform(22, 2), tiny.random_subnet(space, seed=3), *skipping, space.smallest]


@torch.no_grad()
def expected_logits(model, subnet, tokens):
    with model.use(subnet):
        return tiny.logits_of(model, tokens)[0, PROMPT - 1 :]


def decoded_logits(decoder, tokens):
    """Return logits after the prompt's last token and after each further one, [1 + STEPS, V]."""
    logits = [decoder.prefill(tokens[:, :PROMPT]).clone()]
    logits += [decoder.step(token).clone() for token in tokens[0, PROMPT:].tolist()]
    return torch.stack(logits)


def text_tokens():
    return tiny.token_ids(1, PROMPT + STEPS, vocab=VOCAB)


def assert_close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))


def test_logits_are_those_of_transformers(model):
    assert_logits_are_those_of_transformers(model)


def test_logits_are_the_same_in_two_threads(llama):
    torch.set_num_threads(2)  # `thread_count` of conftest sets it back
    assert_logits_are_those_of_transformers(llama)


def test_torch_keeps_its_number_of_threads():
    """Numba sets OpenMP's number when it starts, in a process that has not decoded before."""
    code = (
        "import sys, torch; sys.path.insert(0, 'tests'); import tiny; from flextron.model import ElasticModel;"
        "from flextron.inference.decoder import supports; torch.set_num_threads(1);"
        "print(supports(ElasticModel(tiny.plain_model('llama'))), torch.get_num_threads())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "1"]


def assert_logits_are_those_of_transformers(model):
    for subnet in subnets(model):
        decoder = Decoder(model, subnet, max_tokens=PROMPT + STEPS)
        assert_close(decoded_logits(decoder, text_tokens()), expected_logits(model, subnet, text_tokens()))
        assert model.subnet == model.search_space.full


def test_a_decoder_takes_a_new_text_and_leaves_the_weights(llama):
    before = copy.deepcopy(llama.lm.state_dict())
    decoder = Decoder(llama, llama.search_space.uniform(22, 2), max_tokens=PROMPT + STEPS)
    first = decoded_logits(decoder, text_tokens())
    decoded_logits(decoder, text_tokens().flip(1))
    assert torch.equal(decoded_logits(decoder, text_tokens()), first)
    assert all(torch.equal(weight, before[name]) for name, weight in llama.lm.state_dict().items())


def test_a_model_is_the_same_after_decoding(llama, tmp_path):
    """Closing projections lie in memory in another order from then on; what is computed, saved and known stays."""
    before, fingerprint = {name: p.clone() for name, p in llama.lm.named_parameters()}, llama.fingerprint()
    tokens = tiny.token_ids(vocab=VOCAB)
    logits = tiny.logits_of(llama, tokens)
    Decoder(llama, llama.search_space.full, max_tokens=PROMPT)
    assert not llama.layers[0].mlp.closes.weight.is_contiguous()
    assert llama.fingerprint() == fingerprint
    tiny.assert_same_function(tiny.logits_of(llama, tokens), logits)
    llama.save_pretrained(tmp_path / "saved")
    saved = dict(ElasticModel.from_pretrained(tmp_path / "saved").lm.named_parameters())
    assert all(torch.equal(saved[name], weight) for name, weight in before.items())


def test_without_a_prompt_it_starts_at_the_first_token(llama):
    decoder = Decoder(llama, llama.search_space.full, max_tokens=PROMPT)
    logits = [decoder.step(token).clone() for token in text_tokens()[0, :PROMPT].tolist()]
    assert_close(torch.stack(logits), tiny.logits_of(llama, text_tokens()[:, :PROMPT])[0])


def test_bfloat16_is_as_close_to_float32_as_transformers_is(model):
    exact = {subnet: expected_logits(model, subnet, text_tokens()) for subnet in subnets(model)}
    model.lm.to(torch.bfloat16)
    for subnet, logits in exact.items():
        decoder = Decoder(model, subnet, max_tokens=PROMPT + STEPS)
        ours, theirs = decoded_logits(decoder, text_tokens()), expected_logits(model, subnet, text_tokens())
        assert (ours - logits).norm() < 1.5 * (theirs - logits).norm() < 0.1 * logits.norm()


def test_a_model_in_bfloat16_keeps_its_weights(llama):
    """It is held against its own weights in float32, which are widened for that."""
    llama.lm.to(torch.bfloat16)
    before = {name: p.clone() for name, p in llama.lm.named_parameters()}
    assert supports(llama)
    assert all(torch.equal(p, before[name]) and p.dtype == torch.bfloat16 for name, p in llama.lm.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_can_be_trained_after_decoding(llama, dtype):
    llama.lm.to(dtype)
    with torch.inference_mode():
        Decoder(llama, llama.search_space.full, max_tokens=PROMPT)
    llama.lm.requires_grad_()
    llama(tiny.token_ids(vocab=VOCAB)).logits.float().square().mean().backward()
    assert all(p.grad is not None for p in llama.lm.parameters())


@pytest.mark.parametrize(("model_type", "kinds"), [("llama", [None]), ("gemma3_text", ["full", "sliding"])])
def test_angles_of_far_positions_are_those_of_the_model(model_type, kinds):
    lm = tiny.plain_model(model_type)
    angles, rotary = Angles(lm), lm.model.rotary_emb
    types = [kind and f"{kind}_attention" for kind in kinds]
    assert angles.kinds == types
    for positions in ([0, 7], [3, 300, 299], [1000]):
        for which, kind in enumerate(types):
            expected = rotary(torch.zeros(1), torch.tensor([positions]), *([kind] if kind else ()))
            for found, wanted in zip(angles.of(positions), expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(found[which]), wanted[0])


def test_greedy_tokens_are_those_of_transformers(model):
    prompt = text_tokens()[:, :PROMPT]
    for subnet in subnets(model):
        with model.use(subnet):
            expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False)
        tokens = list(stream_tokens(model, subnet, prompt, max_new_tokens=9))
        assert tokens == expected[0, PROMPT:].tolist()
        assert generate(model, "The quick", subnet=subnet) == generate(model, "The quick", subnet=subnet, fast=False)


@pytest.mark.parametrize("asked", [{}, {"top_k": 3}, {"top_k": 0, "top_p": 0.5}])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_follows_the_seed_and_the_generation_config(llama, asked, temperature):
    llama.lm.generation_config.update(**asked)
    texts = [
        generate(llama, "The quick", max_new_tokens=24, temperature=temperature, seed=seed, fast=fast)
        for seed, fast in ((1, True), (1, True), (1, False), (2, True))
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_sampling_by_a_generator_leaves_the_global_one(llama):
    state = torch.get_rng_state()
    drawn = [
        list(
            stream_tokens(
                llama,
                llama.subnet,
                text_tokens(),
                max_new_tokens=12,
                temperature=1.0,
                generator=torch.Generator().manual_seed(seed),
            )
        )
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_stops_at_the_stop_token_as_transformers_does(llama, capsys):
    prompt = llama.tokenizer("The quick", return_tensors="pt").input_ids
    tokens = list(stream_tokens(llama, llama.subnet, prompt, max_new_tokens=12))
    stop = next(token for place, token in enumerate(tokens) if place > 2 and token not in tokens[:place])
    first = list(itertools.takewhile(lambda token: token != stop, tokens))
    assert list(stream_tokens(llama, llama.subnet, prompt, max_new_tokens=12, stop={stop})) == [*first, stop]
    for eos in (stop, [stop, 1]):
        llama.lm.generation_config.update(eos_token_id=eos, pad_token_id=0)
        texts = [generate(llama, "The quick", max_new_tokens=12, stream=True, fast=fast) for fast in (True, False)]
        assert texts[0] == texts[1] == llama.tokenizer.decode([*first, stop], skip_special_tokens=True)
        printed = capsys.readouterr().out
        assert printed == printed[: len(printed) // 2] * 2  # the pieces too


def test_each_token_comes_before_the_next_is_computed(llama, monkeypatch):
    steps = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, token: steps.append(token) or step(self, token))
    stream = stream_tokens(llama, llama.subnet, text_tokens(), max_new_tokens=3)
    assert [len(steps) for _ in stream] == [0, 1, 2]
    assert len(steps) == 2  # none after the last


def test_errors_name_the_limit_and_the_way_out(llama):
    full = llama.search_space.full
    decoder = Decoder(llama, full, max_tokens=PROMPT)
    decoder.prefill(text_tokens()[:, :PROMPT])
    with pytest.raises(
        ValueError, match=r"8 tokens do not fit into a Decoder made for 7\. Make one with more max_tokens"
    ):
        decoder.step(1)
    with pytest.raises(ValueError, match="12 tokens do not fit"):
        decoder.prefill(text_tokens())
    with pytest.raises(ValueError, match="got 2 prompts; a Decoder takes one"):
        decoder.prefill(tiny.token_ids(2, 3))
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        next(stream_tokens(llama, full, text_tokens(), max_new_tokens=0))
    with pytest.raises(SubnetError, match="for a model of 1 layers"):
        Decoder(llama, Subnet((8,), (1,)), max_tokens=4)
    with pytest.raises(ValueError, match="fast decoding does not support this GPT2LMHeadModel"):
        Decoder(ElasticModel(tiny.plain_model("gpt2")), tiny.random_subnet(full, 1), max_tokens=4)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("llama", rope("dynamic")),
    ],
)
def test_what_it_does_not_support_is_left_to_transformers(model_type, changes, monkeypatch):
    model = ElasticModel(tiny.plain_model(model_type, vocab_size=VOCAB, **changes), tiny.tokenizer())
    assert not supports(model)
    monkeypatch.setattr(decoding, "Decoder", None)
    subnet = tiny.random_subnet(model.search_space, seed=3)
    fast, plain = (generate(model, "The quick", subnet=subnet, max_new_tokens=9, fast=fast) for fast in (True, False))
    assert fast == plain != ""


def test_does_not_support_what_is_not_in_the_weights(llama):
    assert supports(llama)
    llama.lm.half()
    assert not supports(llama)
    llama.lm.float()
    llama.lm.train()
    assert not supports(llama)
    llama.lm.eval()
    llama.lm.config._attn_implementation = "other"
    assert not supports(llama)
    llama.lm.config._attn_implementation = "eager"
    llama.lm.lm_head.__class__ = type("Quantised", (torch.nn.Linear,), {})
    assert not supports(llama)


def test_does_not_support_adapters(llama):
    add_adapters(llama, rank=2)
    assert not supports(llama)


def test_a_generation_config_that_asks_for_more_is_left_to_transformers(llama):
    config = llama.lm.generation_config
    config.update(repetition_penalty=1.0, num_beams=1, top_k=5, early_stopping=False, eos_token_id=[1])
    assert can_stream(llama)
    for asked in ({"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 1}, {"min_p": 0.5}):
        llama.lm.generation_config = copy.deepcopy(config)
        llama.lm.generation_config.update(**asked)
        assert not can_stream(llama)
    llama.lm.generation_config.update(repetition_penalty=1.5)
    assert supports(llama)
    texts = [generate(llama, "The quick", max_new_tokens=9, fast=fast) for fast in (True, False)]
    assert texts[0] == texts[1]
