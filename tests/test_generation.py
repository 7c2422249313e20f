"""Generation: the text of transformers' own `generate`, whole or in pieces, and clear errors."""

import copy
import json
import shutil
import threading
from itertools import zip_longest

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import tiny
from flextron.costs.pricing import formula_table
from flextron.costs.table import linear_table
from flextron.errors import FlextronError, SubnetError
from flextron.generation import generate, stream
from flextron.inference.speculative import Draft
from flextron.inference.streaming import can_stream
from flextron.inference.text import text_pieces
from flextron.model import ElasticModel
from flextron.routers.static.net import StaticRouter
from flextron.routers.token.batch import TokenRouting
from flextron.routers.token.net import TokenRouter
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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('a system message comes first') }}", "a system message comes first"),
        ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
        ("{{ messages[0].content + 1 }}", "str"),
    ],
)
def test_a_chat_template_that_refuses_or_is_broken_is_one_line(model, template, message):
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.chat_template = template
    with pytest.raises(
        FlextronError, match=rf"chat template takes no such message: .*{message}.*Leave out chat"
    ) as error:
        generate(model, "Hi", chat=True)
    assert "\n" not in str(error.value)


def test_a_text_longer_than_learned_positions_is_refused():
    model = ElasticModel(tiny.plain_model("gpt2", vocab_size=300), tiny.tokenizer())  # of 64 positions
    used = len(model.tokenizer("The quick").input_ids)
    with pytest.raises(
        ValueError, match=rf"{used + 64} tokens are more than the 64 positions .*--max-new-tokens {64 - used}\)"
    ):
        generate(model, "The quick", max_new_tokens=64)
    assert generate(model, "The quick", max_new_tokens=64 - used)


def test_a_prompt_longer_than_the_model_reads_is_refused(model):
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens; this model reads at most 64"):
        generate(model, tiny.TEXT * 9)


def test_absurd_numbers_of_new_tokens_are_refused(model):
    most = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"{10**30} new tokens are more than the {most} that this model reads"):
        generate(model, "a", max_new_tokens=10**30)


def test_a_prompt_that_is_no_text_is_one_line(model):
    with pytest.raises(FlextronError, match="the prompt is not UTF-8"):
        generate(model, "é\ud800")


def test_errors_name_the_way_out(model):
    with pytest.raises(FlextronError, match="prompt is empty"):
        generate(model, "  ")
    with pytest.raises(FlextronError, match="no chat template"):
        generate(model, "Hi", chat=True)
    with pytest.raises(SubnetError, match="for a model of 1 layers"):
        generate(model, "Hi", subnet=Subnet((8,), (1,)))
    with pytest.raises(ValueError, match="max_new_tokens is 0; ask for 1 or more"):
        generate(model, "Hi", max_new_tokens=0)
    with pytest.raises(FlextronError, match="no tokenizer"):
        generate(ElasticModel(tiny.plain_model("llama")), "Hi")


def test_chat_uses_the_template(model):
    model.tokenizer = tiny.tokenizer()
    model.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    try:
        assert generate(model, "fox", chat=True, max_new_tokens=4) == generate(model, "[fox]", max_new_tokens=4)
    finally:
        model.tokenizer.chat_template = None


PROMPT = "w3 w14 w15"
NEW = 12


def words():
    """A tokenizer of 300 words, each with the space before it, as SentencePiece has them."""
    tokenizer = Tokenizer(models.WordLevel({f"▁w{number}": number for number in range(300)}, unk_token="▁w0"))  # noqa: S106
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_tokenizer(model_type):
    return ElasticModel(tiny.plain_model(model_type, vocab_size=300), words())


@pytest.fixture(params=["gpt2", "llama"])
def either(request):
    """A model that transformers decodes, and one that our own loop does."""
    model = with_tokenizer(request.param)
    assert can_stream(model) == (request.param == "llama")
    return model


def greedy(model, subnet):
    """The text by transformers' own `generate`."""
    prompt = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    with model.use(subnet):
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
    return model.tokenizer.decode(output[0]).removeprefix(PROMPT)


def threads():
    """Threads of generation that are alive."""
    return [thread for thread in threading.enumerate() if thread.name == "flextron generate"]


@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_pieces_of_every_family_are_its_text(model_type):
    model = with_tokenizer(model_type)
    subnet = tiny.random_subnet(model.search_space, seed=3)
    for fast in (True, False):
        pieces = list(stream(model, PROMPT, subnet=subnet, max_new_tokens=NEW, fast=fast))
        assert "".join(pieces) == greedy(model, subnet)
        assert "".join(pieces) == generate(model, PROMPT, subnet=subnet, max_new_tokens=NEW, fast=fast)
        assert len(pieces) == NEW
        assert all(piece.startswith(" w") for piece in pieces)
    assert model.subnet == model.search_space.full
    assert not threads()


def test_a_piece_is_there_before_the_next_is_computed(either):
    passes = []
    either.lm.lm_head.register_forward_hook(lambda *_: passes.append(1))
    pieces = stream(either, PROMPT, max_new_tokens=NEW, fast=False)
    assert not passes
    next(pieces)
    before = len(passes)
    assert 0 < before < NEW
    assert len(threads()) == 1
    next(pieces)
    assert before < len(passes) < NEW
    pieces.close()
    assert len(passes) < NEW


@pytest.mark.parametrize("speculative", [None, 3])
def test_closed_early_all_is_as_before(either, speculative):
    space = either.search_space
    expected = tiny.logits_of(either, tiny.token_ids())
    draft = None if speculative is None else Draft(space.uniform(36), speculative)
    for subnet in (space.full, space.uniform(38)):
        pieces = stream(either, PROMPT, subnet=subnet, max_new_tokens=NEW, speculative=draft)
        next(pieces)
        assert either.subnet == space.full
        pieces.close()
        assert not threads()
        assert either.subnet == space.full
        assert torch.equal(tiny.logits_of(either, tiny.token_ids()), expected)
    if draft is not None:
        assert 0 < draft.written < 2 * NEW
    for piece in stream(either, PROMPT, max_new_tokens=NEW):
        assert piece
        break
    assert not threads()


def test_an_error_on_the_way_reaches_the_reader(either):
    def fail(*_):
        if len(calls) == 3:
            raise RuntimeError("the third pass fails")
        calls.append(1)

    calls = []
    either.lm.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the third pass fails"):
        list(stream(either, PROMPT, max_new_tokens=NEW, fast=False))
    assert not threads()
    assert either.subnet == either.search_space.full


def test_texts_written_in_turn_do_not_disturb_each_other(either):
    subnets = [either.search_space.full, tiny.random_subnet(either.search_space, seed=3)]
    expected = [generate(either, PROMPT, subnet=subnet, max_new_tokens=NEW) for subnet in subnets]
    assert expected[0] != expected[1]
    texts = ["", ""]
    for pieces in zip_longest(*(stream(either, PROMPT, subnet=subnet, max_new_tokens=NEW) for subnet in subnets)):
        texts = [text + (piece or "") for text, piece in zip(texts, pieces, strict=True)]
        with either.use(either.search_space.uniform(20)):
            tiny.logits_of(either, tiny.token_ids())
    assert texts == expected


def test_the_seed_and_the_temperature_are_those_of_generate(either):
    for seed in (1, 2):
        options = {"temperature": 0.9, "seed": seed, "max_new_tokens": NEW}
        pieces = "".join(stream(either, PROMPT, **options))
        assert pieces == generate(either, PROMPT, **options) == generate(either, PROMPT, fast=False, **options)


def test_drafts_write_the_same_pieces(either):
    draft = either.search_space.uniform(38)
    text = generate(either, PROMPT, max_new_tokens=NEW)
    for fast in (True, False):
        pieces = list(stream(either, PROMPT, max_new_tokens=NEW, speculative=draft, fast=fast))
        assert "".join(pieces) == text


def test_what_only_transformers_does_comes_too():
    model = with_tokenizer("llama")
    plain = generate(model, PROMPT, max_new_tokens=NEW)
    model.lm.generation_config.update(repetition_penalty=1.8)
    assert not can_stream(model)
    assert "".join(stream(model, PROMPT, max_new_tokens=NEW)) == greedy(model, model.subnet) != plain
    model.lm.generation_config.update(repetition_penalty=1.0, num_beams=3)
    assert "".join(stream(model, PROMPT, max_new_tokens=NEW)) == greedy(model, model.subnet) != plain


def test_autocast_of_the_reader_holds(either):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = greedy(either, either.subnet)
        assert "".join(stream(either, PROMPT, max_new_tokens=NEW, fast=False)) == expected
    seen = []
    either.lm.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generate(either, PROMPT, max_new_tokens=2, fast=False)
    assert set(seen) == {torch.bfloat16}


def test_a_budget_is_kept(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "elastic")
    model = ElasticModel.from_pretrained(tmp_path / "elastic")
    sensitivity = tiny.uneven_sensitivity(model)
    sensitivity.save(tmp_path / "elastic")
    table = formula_table(model, "parameters")
    limit = round(0.7 * table.full + 0.3 * table.smallest)
    with model.use(budget=f"{limit / 1000:.3f}k"):
        subnet = model.subnet
    assert subnet != model.search_space.full
    pieces = stream(model, PROMPT, budget=f"{limit / 1000:.3f}k", max_new_tokens=NEW)
    assert "".join(pieces) == generate(model, PROMPT, subnet=subnet, max_new_tokens=NEW)


def test_tokens_are_routed_one_by_one():
    model = with_tokenizer("llama")
    space = model.search_space
    costs = {"fixed": 1.0, "per_neuron": [0.05] * space.layers, "per_kv_group": [0.8] * space.layers}
    table = linear_table(space, metric="tpot", unit="ms", conditions={}, **costs)
    router = TokenRouter(StaticRouter.of(tiny.uneven_sensitivity(model), table, lowest=0.45), tiny.HIDDEN)
    subnet = space.uniform(20, 2)
    routing = TokenRouting(model, router, [0.7], [subnet])
    pieces = stream(model, PROMPT, routing=routing, max_new_tokens=NEW)
    first = next(pieces)
    pieces.close()
    expected = tiny.logits_of(model, tiny.token_ids())
    text = "".join(stream(model, PROMPT, routing=routing, max_new_tokens=NEW))
    assert text == generate(model, PROMPT, routing=routing, max_new_tokens=NEW)
    assert text.startswith(first)
    assert torch.equal(tiny.logits_of(model, tiny.token_ids()), expected)
    assert not threads()


def sentencepiece_like(decoder):
    """A BPE that marks the start of a word with a low line, as Llama 2's does, with bytes for what it does not know."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.train_from_iterator([tiny.TEXT], trainers.BpeTrainer(vocab_size=80, show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    for token in ("<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))):
        trained["vocab"][token] = len(trained["vocab"])
    merges = [tuple(merge) for merge in trained["merges"]]
    bpe.model = models.BPE(trained["vocab"], merges, byte_fallback=True, unk_token="<unk>")  # noqa: S106
    bpe.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")  # noqa: S106


LIKE_LLAMA_2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
TOKENIZERS = {
    "bytes": tiny.tokenizer,
    "metaspace": lambda: sentencepiece_like(decoders.Metaspace()),
    "llama 2": lambda: sentencepiece_like(LIKE_LLAMA_2),
}


class TestPieces:
    @pytest.fixture(params=sorted(TOKENIZERS))
    def tokenizer(self, request):
        return TOKENIZERS[request.param]()

    @pytest.mark.parametrize("prompt", ["The quick", "", "The quick brown fox "])
    def test_together_they_are_the_text_after_the_prompt(self, tokenizer, prompt):
        text = f"{prompt} brown fox jumps over  the lazy dog.\n Pack my box"
        ids, before = tokenizer(text).input_ids, tokenizer(prompt).input_ids
        ids = [*before, *ids[len(before) :]]
        pieces = list(text_pieces(tokenizer, before, ids[len(before) :]))
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces) == decoded[len(tokenizer.decode(before, skip_special_tokens=True)) :]
        assert len(pieces) > 5

    def test_a_leading_space_stays(self, tokenizer):
        before, new = tokenizer("The quick").input_ids, tokenizer("The quick brown").input_ids
        assert new[: len(before)] == before
        assert "".join(text_pieces(tokenizer, before, new[len(before) :])) == " brown"

    def test_a_special_token_does_not_swallow_the_space_after_it(self, tokenizer):
        before, new = tokenizer("The quick").input_ids, tokenizer("The quick brown").input_ids
        new = [tokenizer.eos_token_id, *new[len(before) :]]
        assert "".join(text_pieces(tokenizer, before, new)) == " brown"


@pytest.mark.parametrize("kind", ["bytes", "llama 2"])
class TestCharacters:
    TEXT = "Grüße, 世界 🦊! é"

    def test_none_is_cut(self, kind):
        tokenizer = TOKENIZERS[kind]()
        ids = tokenizer(self.TEXT).input_ids
        assert len(ids) > len(self.TEXT)
        pieces = list(text_pieces(tokenizer, [], ids))
        assert "".join(pieces) == self.TEXT
        assert not any("\ufffd" in piece for piece in pieces)
        assert [piece for piece in pieces if "🦊" in piece]

    def test_one_that_never_ends_comes_last(self, kind):
        tokenizer = TOKENIZERS[kind]()
        ids = tokenizer("ab🦊").input_ids[:-1]
        *whole, last = text_pieces(tokenizer, [], ids)
        assert "".join([*whole, last]) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in whole)
        assert last.startswith("\ufffd")

    def test_bytes_that_are_no_character_do_not_hold_up_the_text(self, kind):
        tokenizer = TOKENIZERS[kind]()
        broken = tokenizer("🦊").input_ids[-1:] * 2
        ids = [*tokenizer("ab").input_ids, *broken, *tokenizer("fox jumps").input_ids]
        pieces = list(text_pieces(tokenizer, [], ids))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert len(pieces) > 2


def test_a_tokenizer_in_python_gives_whole_characters():
    """Three bytes that make a character are three tokens."""
    lm = tiny.plain_model("llama", vocab_size=300)
    model = ElasticModel(lm, ByT5Tokenizer())
    greedy = model.lm.generate(torch.tensor([[101, 102]]), max_new_tokens=12, do_sample=False)[0, 2:]
    pieces = list(text_pieces(model.tokenizer, [101, 102], [*greedy.tolist(), *model.tokenizer("é東").input_ids[:-1]]))
    assert pieces[-2:] == ["é", "東"]
    for fast in (True, False):
        written = generate(model, "bc", max_new_tokens=12, fast=fast)
        assert written == model.tokenizer.decode(greedy, skip_special_tokens=True)
