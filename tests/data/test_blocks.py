"""Text becomes blocks: documents in order, each ended, every byte counted once, and clear words for broken files."""

import bz2
import copy
import gzip
import json
import lzma

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

import tiny
from flextron.data import blocks as blocks_module
from flextron.data.blocks import BATCH_TOKENS, Piece, batch_tokens, document_end, documents, load_blocks, pieces
from flextron.errors import CheckpointError, FlextronError

DOCUMENTS = ["First, é 😀.", "Second\nline.", "Third " + "long " * 50]
WRITERS = {".xz": lzma.compress, ".gz": gzip.compress, "": bytes}


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


def write(folder, name: str, content: str | bytes):
    """A file, compressed where its name says so."""
    file = folder / name
    raw = content.encode() if isinstance(content, str) else content
    file.write_bytes(WRITERS.get(file.suffix, bytes)(raw))
    return file


def json_lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts)


def refusal(file) -> str:
    with pytest.raises(FlextronError) as error:
        list(documents(file))
    assert str(file) in str(error.value)
    return str(error.value)


class TestDocuments:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz"])
    def test_json_lines(self, tmp_path, name):
        file = write(tmp_path, name, json_lines(DOCUMENTS[:2]) + "\n" + json_lines(DOCUMENTS[2:]))
        assert list(documents(file)) == DOCUMENTS
        assert list(documents(str(file))) == DOCUMENTS

    @pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl.zst", "a.xz", "a", "a.jsonl.txt.zip"])
    def test_other_endings_are_refused_and_those_that_are_read_are_named(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"id,text")
        message = r"its name must end in \.jsonl, \.txt, \.md \(each also \.xz, \.gz, \.bz2\)"
        with pytest.raises(FlextronError, match=message):
            list(documents(tmp_path / name))

    def test_bz2(self, tmp_path):
        (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(json_lines(DOCUMENTS).encode()))
        assert list(documents(tmp_path / "a.jsonl.bz2")) == DOCUMENTS

    @pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.xz", "a.md.gz"])
    def test_a_text_is_one_document(self, tmp_path, name):
        assert list(documents(write(tmp_path, name, DOCUMENTS[2]))) == DOCUMENTS[2:]

    def test_reads_no_more_than_it_is_asked_for(self, tmp_path):
        file = write(tmp_path, "a.jsonl", json_lines(DOCUMENTS) + "broken")
        assert next(documents(file)) == DOCUMENTS[0]

    def test_missing(self, tmp_path):
        file = tmp_path / "gone.txt"
        assert refusal(file) == (
            f"no such text file: {file}. Name a file that ends in .jsonl, .txt, .md (each also .xz, .gz, .bz2), or "
            "sample/train."
        )
        assert refusal(tmp_path).startswith("no such text file")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.xz", "a.jsonl.gz"])
    @pytest.mark.parametrize("content", ["", "\n \n"], ids=["nothing", "blanks"])
    def test_empty(self, tmp_path, name, content):
        file = write(tmp_path, name, content)
        assert refusal(file) == f"{file} is empty."

    @pytest.mark.parametrize("suffix", [".xz", ".gz"])
    @pytest.mark.parametrize("place", [0, 0.5], ids=["header", "middle"])
    def test_garbled(self, tmp_path, suffix, place):
        file = write(tmp_path, f"a.txt{suffix}", " ".join(str(number**2) for number in range(5000)))
        content = bytearray(file.read_bytes())
        at = int(len(content) * place)
        content[at : at + 4] = bytes(byte ^ 0xFF for byte in content[at : at + 4])
        file.write_bytes(content)
        assert refusal(file).startswith(f"cannot read {file}: ")

    @pytest.mark.parametrize("suffix", [".xz", ".gz"])
    def test_truncated(self, tmp_path, suffix):
        file = write(tmp_path, f"a.txt{suffix}", DOCUMENTS[2])
        file.write_bytes(file.read_bytes()[:-10])
        assert "ended before the end-of-stream" in refusal(file)

    def test_not_utf8(self, tmp_path):
        assert "can't decode byte 0xff" in refusal(write(tmp_path, "a.txt", b"good \xff"))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", 'line 3: not a JSON object with a "text" field'),
            ('{"txt": "a"}', "line 3: not a JSON object with a \"text\" field ('text')"),
            ('"text"', 'line 3: not a JSON object with a "text" field'),
            ('["text"]', 'line 3: not a JSON object with a "text" field'),
            ("null", 'line 3: not a JSON object with a "text" field'),
            ('{"text": 5}', 'line 3: "text" is a int, not a string.'),
            (f'{{"text": "a", "b": {"1" * 5000}}}', 'line 3: not a JSON object with a "text" field (Exceeds the limit'),
            ("[" * 100_000, 'line 3: not a JSON object with a "text" field'),
        ],
    )
    def test_names_the_line(self, tmp_path, line, message):
        assert message in refusal(write(tmp_path, "a.jsonl", json_lines(["good"]) + "\n" + line + "\n"))


class TestPieces:
    """A text is read and tokenised in pieces; what is shorter than one is as if there were none."""

    TEXT = "one two\nthree\nfour five six seven eight\n\nnine" + "0123456789" * 3

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(blocks_module, "PIECE", 16)

    @pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.jsonl", "a.jsonl.xz"])
    def test_end_at_a_line_else_at_a_blank_else_anywhere(self, tmp_path, name):
        texts = ["short", self.TEXT] if "jsonl" in name else [self.TEXT]
        file = write(tmp_path, name, json_lines(texts) if "jsonl" in name else self.TEXT)
        cut = ["one two\nthree\n", "four five six", " seven eight\n\n", "nine012345678901", "2345678901234567", "89"]
        expected = [Piece(text, number == 0, number == 5) for number, text in enumerate(cut)]
        assert list(pieces(file)) == [*(Piece(text, True, True) for text in texts[:-1]), *expected]
        assert list(documents(file)) == texts

    @pytest.mark.parametrize("length", [15, 16, 17, 32])
    def test_none_is_lost_at_the_end(self, tmp_path, length):
        file = write(tmp_path, "a.txt", "x" * length)
        found = list(pieces(file))
        assert "".join(piece.text for piece in found) == "x" * length
        assert [piece.first for piece in found] == [True] + [False] * (len(found) - 1)
        assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]

    @pytest.mark.parametrize("limit", [1, 15, 16, 17, 40, 1000])
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_a_document_is_cut(self, tmp_path, name, limit):
        file = write(tmp_path, name, json_lines([self.TEXT]) if name == "a.jsonl" else self.TEXT)
        found = list(pieces(file, max_characters=limit))
        assert "".join(piece.text for piece in found) == self.TEXT[:limit]
        assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]

    def test_what_is_cut_off_is_not_read(self, tmp_path):
        assert list(pieces(write(tmp_path, "a.txt", b"good text" * 2000 + b"\xff"), max_characters=4)) == [
            Piece("good", True, True)
        ]

    def test_blocks_are_the_same_where_words_stay_whole(self, tokenizer, tmp_path):
        file = write(tmp_path, "a.jsonl", json_lines([tiny.TEXT * 3, "a", "é" * 40]))
        options = {"tokens": 10_000, "block_tokens": 8, "max_characters": None}
        cut = load_blocks(tokenizer, file, **options)
        blocks_module.PIECE = 1 << 18
        whole = load_blocks(tokenizer, file, **options)
        assert torch.equal(cut.tokens, whole.tokens)
        assert torch.equal(cut.bytes, whole.bytes)
        assert cut.documents == whole.documents == 3
        skipped = load_blocks(tokenizer, file, **options, skip_documents=1)
        blocks_module.PIECE = 16
        assert torch.equal(load_blocks(tokenizer, file, **options, skip_documents=1).tokens, skipped.tokens)

    def test_a_line_of_json_has_a_limit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(blocks_module, "LONGEST_LINE", 30)
        texts = ["x" * 17, "x" * 18]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        assert [len(line) for line in lines] == [30, 31]
        file = write(tmp_path, "a.jsonl.gz", "\n" + "".join(lines))
        assert refusal(file) == (
            f"{file}, line 3 is longer than 30 characters, the most that a line may have. "
            "Write its text into a .txt file, which may be of any size."
        )

    def test_a_cut_of_nothing_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="max_characters is 0; give at least 1, or None"):
            load_blocks(tokenizer, "any.txt", tokens=8, block_tokens=8, max_characters=0)


class TestDocumentEnd:
    def test_endoftext_goes_before_eos(self, tokenizer):
        end = document_end(tokenizer)
        assert end == tokenizer.convert_tokens_to_ids("<|endoftext|>")
        assert end != tokenizer.eos_token_id

    def test_eos_where_there_is_no_other(self):
        words = {"a": 0, "</s>": 1}
        assert document_end(word_tokenizer(words, eos_token="</s>")) == 1  # noqa: S106
        with pytest.raises(CheckpointError, match="no token that ends a text; set its eos_token"):
            document_end(word_tokenizer(words))


def word_tokenizer(words: dict[str, int], **options) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(tiny.models.WordLevel(words)), **options)


class TestBlocks:
    def test_documents_follow_one_another_each_ended(self, tokenizer, tmp_path):
        file = write(tmp_path, "a.jsonl", json_lines(DOCUMENTS))
        blocks = load_blocks(tokenizer, file, tokens=160, block_tokens=20)
        end = document_end(tokenizer)
        expected = [token for text in DOCUMENTS for token in (*tokenizer.encode(text), end)][:160]
        assert blocks.tokens.shape == (8, 20)
        assert blocks.tokens.flatten().tolist() == expected
        assert expected.count(end) == 2
        assert (blocks.bytes[blocks.tokens == end] == 0).all()
        assert blocks.text == str(file)

    @pytest.mark.parametrize("wanted", [10_000, 64, 63, 32])
    def test_as_many_whole_blocks_as_wanted_and_there(self, tokenizer, tmp_path, wanted):
        file = write(tmp_path, "a.txt", tiny.TEXT * 5)
        there = len(tokenizer.encode(tiny.TEXT * 5)) + 1
        blocks = load_blocks(tokenizer, file, tokens=wanted, block_tokens=32)
        assert blocks.tokens.shape == (min(wanted, there) // 32, 32)
        assert blocks.bytes.shape == blocks.tokens.shape

    def test_stops_reading_when_it_has_enough(self, tokenizer, tmp_path):
        file = write(tmp_path, "a.jsonl", json_lines(DOCUMENTS) + "broken")
        assert load_blocks(tokenizer, file, tokens=16, block_tokens=8).tokens.numel() == 16
        with pytest.raises(FlextronError, match="line 4"):
            load_blocks(tokenizer, file, tokens=10_000, block_tokens=8)

    @pytest.mark.parametrize(
        ("limit", "characters"), [(30, 30), (None, len(DOCUMENTS[2])), (10_000, len(DOCUMENTS[2]))]
    )
    def test_cuts_long_documents(self, tokenizer, tmp_path, limit, characters):
        file = write(tmp_path, "a.txt", DOCUMENTS[2])
        blocks = load_blocks(tokenizer, file, tokens=10_000, block_tokens=2, max_characters=limit)
        text = tokenizer.decode([token for token in blocks.tokens.flatten() if token != document_end(tokenizer)])
        assert characters - 4 < len(text) <= characters
        assert DOCUMENTS[2].startswith(text)

    def test_too_short(self, tokenizer, tmp_path):
        file = write(tmp_path, "a.txt", "abc")
        with pytest.raises(FlextronError) as error:
            load_blocks(tokenizer, file, tokens=100, block_tokens=50)
        assert str(error.value) == (
            f"{file} holds 4 tokens, less than one block of 50. Give a longer text or a smaller block size."
        )

    @pytest.mark.parametrize(("tokens", "block_tokens"), [(10, 1), (10, 0), (10, 11)])
    def test_sizes_that_make_no_block(self, tokenizer, tokens, block_tokens):
        with pytest.raises(ValueError, match=f"got {tokens} in {block_tokens}s"):
            load_blocks(tokenizer, "any.txt", tokens=tokens, block_tokens=block_tokens)

    def test_no_tokenizer(self):
        with pytest.raises(FlextronError, match="has no tokenizer; put its tokenizer files into the same folder"):
            load_blocks(None, "any.txt", tokens=10)

    def test_batches(self):
        blocks = tiny.blocks(rows=5, time=10)
        assert [len(batch) for batch in blocks.batches(20)] == [2, 2, 1]
        assert [len(batch) for batch in blocks.batches(29)] == [2, 2, 1]
        assert [len(batch) for batch in blocks.batches(3)] == [1] * 5
        assert torch.equal(torch.cat(list(blocks.batches(20))), blocks.tokens)


def test_a_gpu_gets_larger_batches():
    assert batch_tokens(torch.device("cpu")) == BATCH_TOKENS
    assert batch_tokens(torch.device("cpu"), 100) == 100
    assert batch_tokens(torch.device("cuda"), 100) == 1600


class TestBytes:
    TEXTS = ("plain words", "é", "😀", "a😀😀b", "naïve – 東京 🏳️‍🌈 end", "  spaces  \n\n\t", "\r\n", "<|im_end|> x")

    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("trim", [None, False, True])
    def test_every_byte_counts_once(self, tokenizer, tmp_path, text, trim):
        if trim is not None:  # GPT-2's post-processor, which leaves blanks out of the offsets
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            )
            tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        file = write(tmp_path, "a.jsonl", json_lines([text]))
        count = len(tokenizer.encode(text)) + 1
        blocks = load_blocks(tokenizer, file, tokens=count, block_tokens=count)
        assert blocks.bytes.sum().item() == len(text.encode())

    def test_a_split_character_belongs_to_its_first_token(self, tokenizer, tmp_path):
        file = write(tmp_path, "a.txt", "a😀b")
        blocks = load_blocks(tokenizer, file, tokens=7, block_tokens=7)
        assert blocks.bytes.tolist() == [[1, 4, 0, 0, 0, 1, 0]]

    def test_predicted_are_all_but_the_first_of_a_block(self, tokenizer, tmp_path):
        file = write(tmp_path, "a.txt", "éabcdefg")
        blocks = load_blocks(tokenizer, file, tokens=10, block_tokens=5)
        assert blocks.predicted_tokens == 8
        assert blocks.predicted_bytes == blocks.bytes.sum() - blocks.bytes[:, 0].sum() == 9 - 2 - blocks.bytes[1, 0]

    def test_half_a_character_in_json(self, tokenizer, tmp_path):
        """JSON can spell half of a surrogate pair, which is no text."""
        file = write(tmp_path, "a.jsonl", json_lines(["good"]) + '{"text": "abc \\ud83d def"}\n')
        with pytest.raises(FlextronError, match=f"{file}, line 2"):
            load_blocks(tokenizer, file, tokens=16, block_tokens=4)


class TestTokenizerInPython:
    """It says nothing of where its tokens are in the text."""

    @pytest.mark.parametrize("kind", [ByT5Tokenizer, CanineTokenizer])
    def test_all_bytes_are_counted_in_equal_parts(self, kind, tmp_path):
        tokenizer, texts = kind(), ["é😀 and more", "plain words"]
        file = write(tmp_path, "a.jsonl", json_lines(texts))
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        start = [tokenizer.bos_token_id] if kind is CanineTokenizer else []
        expected = [token for part in ids for token in (*start, *part, tokenizer.eos_token_id)]
        blocks = load_blocks(tokenizer, file, tokens=len(expected), block_tokens=len(expected))
        assert blocks.tokens.flatten().tolist() == expected
        sizes = blocks.bytes.flatten()[len(start) : len(start) + len(ids[0])]
        assert sizes.sum() == len(texts[0].encode())
        assert sizes.max() - sizes.min() <= 1
        assert blocks.bytes.sum() == sum(len(text.encode()) for text in texts)


def test_documents_start_with_bos_where_the_tokenizer_puts_it(tmp_path):
    file = write(tmp_path, "a.jsonl", json_lines(["The quick", "lazy dog"]))
    tokenizer = copy.deepcopy(tiny.tokenizer())
    plain = load_blocks(tokenizer, file, tokens=8, block_tokens=4)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    started = load_blocks(tokenizer, file, tokens=8, block_tokens=4)
    assert bos not in plain.tokens
    assert started.tokens.flatten()[:6].tolist() == [bos, *plain.tokens.flatten()[:4].tolist(), bos]
    assert started.bytes.flatten()[0] == 0
