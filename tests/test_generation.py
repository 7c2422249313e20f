"""Generation: the text of transformers' own `generate`, and clear errors."""

import pytest
import torch

import tiny
from flextron.errors import FlextronError, SubnetError
from flextron.generation import generate
from flextron.model import ElasticModel
from flextron.subnet import Subnet


@pytest.fixture
def model():
    return ElasticModel(tiny.plain_model("llama", vocab_size=300), tiny.tokenizer())


def test_is_the_greedy_text_of_the_sub_network(model):
    subnet = tiny.random_subnet(model.search_space, seed=3)
    prompt = model.tokenizer("The quick", return_tensors="pt").input_ids
    tokens = prompt
    with model.use(subnet):
        for _ in range(6):
            tokens = torch.cat([tokens, tiny.logits_of(model, tokens)[:, -1:].argmax(-1)], dim=1)
    expected = model.tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
    assert generate(model, "The quick", subnet=subnet, max_new_tokens=6) == expected
    assert model.subnet == model.search_space.full


def test_streams_what_it_returns(model, capsys):
    text = generate(model, "The quick", max_new_tokens=6, stream=True)
    assert capsys.readouterr().out.strip() == text.strip()


def test_sampling_follows_the_seed(model):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(model, "The quick", max_new_tokens=12, temperature=1.0))
    assert texts[0] == texts[1] != texts[2]


def test_errors_name_the_way_out(model):
    with pytest.raises(FlextronError, match="prompt is empty"):
        generate(model, "  ")
    with pytest.raises(FlextronError, match="no chat template"):
        generate(model, "Hi", chat=True)
    with pytest.raises(SubnetError, match="for a model of 1 layers"):
        generate(model, "Hi", subnet=Subnet((8,), (1,)))
    with pytest.raises(FlextronError, match="no tokenizer"):
        generate(ElasticModel(tiny.plain_model("llama")), "Hi")


def test_chat_uses_the_template(model):
    model.tokenizer = tiny.tokenizer()
    model.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    try:
        assert generate(model, "fox", chat=True, max_new_tokens=4) == generate(model, "[fox]", max_new_tokens=4)
    finally:
        model.tokenizer.chat_template = None
