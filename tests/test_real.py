"""The real SmolLM2-135M-Instruct: load, rank a little, loss of a sub-network, generate, save, export and reload."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flextron import ElasticModel, evaluate, export, generate, load_blocks, rank
from flextron.demo.quickstart import smollm2_path
from flextron.elastic.checkpoint import quiet_transformers
from flextron.generation import can_stream, stream_tokens

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model():
    """Loaded once. `ranked` permutes its units, which changes no loss and no text of the full model."""
    quiet_transformers()
    return ElasticModel.from_pretrained(smollm2_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def ranked(model):
    """SmolLM2 ranked on 2,048 tokens, and its losses before: full, and all MLPs at 1152 neurons."""
    blocks = load_blocks(model.tokenizer, "sample/validation", tokens=1024)
    space = model.search_space
    before = evaluate(model, [space.full, space.uniform(1152)], blocks)
    rank(model, load_blocks(model.tokenizer, "sample/train", tokens=2048))
    return model, blocks, before


def test_default_search_space_and_shares(model):
    space = model.search_space
    assert (space.layers, space.neurons[1], space.neurons[-1], space.kv_groups) == (30, 64, 1536, (0, 1, 2, 3))
    assert model.layer_weights(space.full) == 30 * (3 * 576 * 1536 + 2 * 576 * 576 + 2 * 576 * 192)
    assert model.share(space.uniform(768)) == pytest.approx(0.625)


def test_ranking_keeps_the_full_model_and_saves_the_narrow_one(ranked):
    model, blocks, before = ranked
    space = model.search_space
    after = evaluate(model, [space.full, space.uniform(1152)], blocks)
    assert before[0].nats_per_token == pytest.approx(3.894, abs=0.01)  # of the sample's first 1,024 tokens, in fp32
    assert after[0].nats_per_token == pytest.approx(before[0].nats_per_token, abs=1e-4)
    assert before[1].difference > 2.5  # unranked
    assert after[1].difference < 1.0


def test_generates_what_it_should(model):
    assert "Paris" in generate(model, "The capital of France is", max_new_tokens=8)
    with model.use(model.search_space.uniform(1344)):
        assert len(generate(model, "The capital of France is", max_new_tokens=8)) > 5


def test_greedy_text_is_that_of_transformers(model):
    assert can_stream(model)
    prompt = model.tokenizer("Once upon a time, in a land far away,", return_tensors="pt").input_ids
    for subnet in (model.search_space.full, model.search_space.uniform(1280, 2)):
        with model.use(subnet):
            expected = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False
            )
        tokens = list(stream_tokens(model, subnet, prompt, max_new_tokens=24, stop={2}))
        assert tokens == expected[0, prompt.shape[1] :].tolist()


def test_saved_folder_is_a_plain_checkpoint(ranked, tmp_path):
    model, blocks, _ = ranked
    model.save_pretrained(tmp_path / "elastic")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "elastic")
    tokens = blocks.tokens[:1, :64]
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, model(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "elastic")
    text = "It’s one checkpoint, every latency."
    assert tokenizer(text).input_ids == model.tokenizer(text).input_ids
    assert tokenizer.chat_template == model.tokenizer.chat_template


def test_export_reloads_to_the_same_loss(ranked, tmp_path):
    model, blocks, _ = ranked
    subnet = model.search_space.uniform(768, 2)
    report = export(model, subnet, tmp_path / "small")
    assert report.largest_logit_difference < 1e-3
    assert report.parameters_got == report.parameters_asked < 100e6
    reloaded = ElasticModel.from_pretrained(tmp_path / "small")
    losses = [
        evaluate(model, [subnet], blocks)[0].nats_per_token,
        evaluate(reloaded, [reloaded.search_space.full], blocks)[0].nats_per_token,
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
