"""Pieces of text with stop strings: what is sent is what a search of the whole text gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import make_tokenizer

from flextron.serving.api.writing import TokenTexts, Writer
from flextron.serving.engine import Token

TOKENIZER = make_tokenizer()
IDS = [token for token in range(2, 300) if "\ufffd" not in TOKENIZER.decode([token])]
LETTERS = [token for token in IDS if TOKENIZER.decode([token]) in "abc"]


def written(ids, stop=(), prompt=()):
    writer = Writer(TOKENIZER, prompt, stop)
    sent = [writer.push(Token(token, 0, 0.0)) for token in ids]
    return writer, [*sent, writer.end()]


@given(st.lists(st.sampled_from(LETTERS), max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_text_ends_before_the_first_stop_string(ids, stop):
    whole = TOKENIZER.decode(ids)
    ends = [whole.index(each) for each in stop if each in whole]
    writer, sent = written(ids, stop)
    text = "".join(each.text for pieces in sent for each in pieces)
    assert writer.stopped == bool(ends)
    if not ends:
        assert text == whole
    else:  # the one that is whole first ends the text, though a longer one may have begun before it
        assert any(whole.startswith(text + each) for each in stop)
        assert not any(each in text for each in stop)


def test_nothing_waits_without_need():
    ids = TOKENIZER("The quick brown fox").input_ids
    _, sent = written(ids, ["☃"])
    assert all(len(pieces) == 1 for pieces in sent[:-1])
    assert sent[-1] == []


def test_tokens_keep_their_texts():
    ids = TOKENIZER("Grüße, 世界!").input_ids
    _, sent = written(ids)
    flat = [each for pieces in sent for each in pieces]
    assert [each.token.id for each in flat] == ids
    assert "".join(each.text for each in flat) == "Grüße, 世界!"


def test_a_leading_space_stays_after_a_long_prompt():
    prompt = [*TOKENIZER("The quick").input_ids, *[TOKENIZER.eos_token_id] * 50]
    _, sent = written(TOKENIZER(" brown").input_ids, prompt=prompt)
    assert "".join(each.text for pieces in sent for each in pieces) == " brown"


@pytest.mark.parametrize("text", [" the", "a", "\n"])
def test_single_tokens_have_their_texts(text):
    token = TOKENIZER(text).input_ids
    assert "".join(TokenTexts(TOKENIZER)[each] for each in token) == text
