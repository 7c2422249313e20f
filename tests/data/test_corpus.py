"""A corpus gives every block once an epoch, in an order that resuming, caches and crashes do not change."""

import copy
import gzip
import json
import lzma
import os
import random
import re
import resource
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import tiny
from flextron.data import blocks as blocks_module
from flextron.data import corpus as corpus_module
from flextron.data import sources as sources_module
from flextron.data.blocks import document_end, load_blocks
from flextron.data.corpus import Corpus, Source, positions
from flextron.errors import CheckpointError, FlextronError, TooLittleTextError

T = 8  # tokens of a block
SHARD = 5 * T + 3
NUMBERS = [" ".join(str(number) for number in range(start, start + 20)) for start in range(0, 400, 20)]
WORDS = [f"{word} and {word}" * 9 for word in "abcdefg"]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Documents are read and tokenised a few at a time, as a large corpus is."""
    monkeypatch.setattr(corpus_module, "GROUP_CHARACTERS", 100)


@pytest.fixture
def numbers(tmp_path):
    return write(tmp_path / "numbers.jsonl", json_lines(NUMBERS))


@pytest.fixture
def words(tmp_path):
    return write(tmp_path / "words.jsonl", json_lines(WORDS))


@pytest.fixture
def make(tmp_path):
    """A corpus with small blocks and shards, and its cache in the test's folder."""

    def make(*sources, tokenizer=None, **options) -> Corpus:
        options = {"block_tokens": T, "shard_tokens": SHARD, "cache": tmp_path / "cache", **options}
        return Corpus(tokenizer or tiny.tokenizer(), [str(source) for source in sources], **options)

    return make


def write(file, content: str | bytes):
    file.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    file.write_bytes({".xz": lzma.compress, ".gz": gzip.compress}.get(file.suffix, bytes)(raw))
    return file


def json_lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def stream(texts: list[str], tokenizer=None) -> list[int]:
    """All tokens of the texts, as a plain loop has them."""
    tokenizer = tokenizer or tiny.tokenizer()
    return [token for text in texts for token in (*tokenizer.encode(text), document_end(tokenizer))]


def epoch_blocks(texts: list[str], shard: int = SHARD, tokenizer=None) -> list[list[list[int]]]:
    """The blocks of each shard in the order of the text."""
    tokens = stream(texts, tokenizer)
    shards = [tokens[start : start + shard] for start in range(0, len(tokens), shard)]
    return [[part[at : at + T] for at in range(0, len(part) - T + 1, T)] for part in shards]


def count_blocks(texts: list[str]) -> int:
    return sum(len(blocks) for blocks in epoch_blocks(texts))


def shard_files(folder) -> list:
    return sorted(folder.rglob("shard-*.safetensors"))


class TestSource:
    @pytest.mark.parametrize(
        ("text", "path", "weight"),
        [
            ("a.txt", "a.txt", 1.0),
            ("a.txt@0.3", "a.txt", 0.3),
            ("datasets:a/b,c@2", "datasets:a/b,c", 2.0),
            ("me@home/a.txt", "me@home/a.txt", 1.0),
            ("me@home.txt@1", "me@home.txt", 1.0),
        ],
    )
    def test_parse(self, text, path, weight):
        assert Source.parse(text) == Source(path, weight)

    def test_a_file_with_an_at(self, tmp_path):
        file = write(tmp_path / "a@3", "text")
        assert Source.parse(str(file)) == Source(str(file))

    @pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
    def test_weights_that_are_none(self, weight):
        with pytest.raises(ValueError, match=rf"weight {float(weight)} of a.txt is not a finite number above 0"):
            Source.parse(f"a.txt@{weight}")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "a.txt@much",
                r"weight 'much' of 'a.txt' is no number. Write PATH@0.3, or PATH@1 if PATH itself",
            ),
            ("", "empty path"),
            ("@1", "empty path"),
        ],
    )
    def test_not_a_source(self, text, message):
        with pytest.raises(ValueError, match=message):
            Source.parse(text)


class TestBlocks:
    def test_every_block_once_shard_after_shard(self, make, numbers):
        corpus = make(numbers)
        shards = epoch_blocks(NUMBERS)
        assert len(shards) > 4
        for blocks in shards:
            if blocks:
                assert sorted(corpus.next_blocks(len(blocks)).tolist()) == sorted(blocks)

    def test_the_same_as_load_blocks(self, make):
        corpus = make("sample/train", block_tokens=64, shard_tokens=64 * 50)
        blocks = load_blocks(tiny.tokenizer(), "sample/train", tokens=64 * 50, block_tokens=64, max_characters=None)
        drawn = corpus.next_blocks(50)
        assert drawn.dtype == torch.int64
        assert sorted(drawn.tolist()) == sorted(blocks.tokens.tolist())
        assert drawn.tolist() != blocks.tokens.tolist()

    @pytest.mark.parametrize("length", [2 * SHARD - 1, 2 * SHARD, 2 * SHARD + 1, 3 * SHARD + T])
    def test_a_text_that_ends_at_or_near_the_end_of_a_shard(self, make, tmp_path, length):
        texts = ["é" * 40, "z" * (length - 82)]  # a token for each byte, and the two that end them
        assert len(stream(texts)) == length
        corpus = make(write(tmp_path / "a.jsonl", json_lines(texts)))
        expected = [block for blocks in epoch_blocks(texts) for block in blocks]
        for epoch in range(2):
            assert sorted(corpus.next_blocks(len(expected)).tolist()) == sorted(expected)
            assert corpus.epochs == {str(tmp_path / "a.jsonl"): epoch}
        assert len(shard_files(tmp_path)) == -(-length // SHARD)

    def test_documents_start_with_bos_where_the_tokenizer_puts_it(self, make, words):
        tokenizer = copy.deepcopy(tiny.tokenizer())
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        bos = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
        corpus = make(words, tokenizer=tokenizer, block_tokens=SHARD)
        assert corpus.next_blocks(1)[0, 0] == bos
        assert sorted(corpus.next_blocks(1).flatten().tolist()) == sorted(stream(WORDS, tokenizer)[SHARD : 2 * SHARD])

    def test_seeds_and_epochs_have_orders_of_their_own(self, make, numbers):
        count = count_blocks(NUMBERS)
        first, again, other = make(numbers), make(numbers), make(numbers, seed=1)
        one, two = first.next_blocks(count).tolist(), first.next_blocks(count).tolist()
        assert one == again.next_blocks(count).tolist()
        seeded = other.next_blocks(count).tolist()
        assert one != two
        assert one != seeded
        assert sorted(one) == sorted(two) == sorted(seeded)

    def test_epochs_count_what_is_read_through(self, make, numbers, words):
        corpus = make(numbers, words)
        count = count_blocks(WORDS)
        corpus.next_blocks(2 * count)
        assert corpus.epochs == {str(numbers): 0, str(words): 0}
        corpus.next_blocks(2)
        assert corpus.epochs == {str(numbers): 0, str(words): 1}

    def test_too_short(self, make, tmp_path, numbers):
        file = write(tmp_path / "short.txt", "abc")
        with pytest.raises(TooLittleTextError) as error:
            make(numbers, file).next_blocks(2)
        assert str(error.value) == (
            f"{file} holds 4 tokens, less than one block of 8. Give a longer text or a smaller block size."
        )

    @pytest.mark.parametrize(
        "options", [{"block_tokens": 1}, {"block_tokens": 9, "shard_tokens": 8}, {"seed": -1}], ids=str
    )
    def test_settings_that_make_no_sense(self, make, numbers, options):
        with pytest.raises(ValueError, match="a block is 2 tokens to a whole shard, a seed is 0 or more"):
            make(numbers, **options)

    def test_no_sources_one_twice_no_blocks_no_tokenizer(self, make, numbers):
        with pytest.raises(ValueError, match="at least one source"):
            make()
        with pytest.raises(ValueError, match="named twice"):
            make(numbers, f"{numbers}@3")
        with pytest.raises(ValueError, match="got 0 blocks"):
            make(numbers).next_blocks(0)
        with pytest.raises(FlextronError, match="has no tokenizer"):
            Corpus(None, [str(numbers)], block_tokens=T)


class TestPieces:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        for module in (blocks_module, sources_module):
            monkeypatch.setattr(module, "PIECE", 64)

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_the_tokens_of_whole_documents(self, make, tmp_path, name):
        """Where lines end at blanks, a piece more or less changes no token."""
        texts = ["\n".join(NUMBERS)] if name == "a.txt" else ["\n".join(NUMBERS[:9]), "b", "\n".join(WORDS)]
        file = write(tmp_path / name, texts[0] if name == "a.txt" else json_lines(texts))
        shards = epoch_blocks(texts)
        corpus = make(file)
        for blocks in shards:
            assert sorted(corpus.next_blocks(len(blocks)).tolist() if blocks else []) == sorted(blocks)

    def test_goes_on_inside_a_document(self, make, tmp_path):
        file = write(tmp_path / "a.jsonl", json_lines(["c", "\n".join(NUMBERS), "d"]))
        expected = make(file).next_blocks(200)
        for removed in range(len(shard_files(tmp_path))):
            shard_files(tmp_path)[removed].unlink()
            assert torch.equal(make(file).next_blocks(200), expected)

    def test_a_text_in_pieces_is_another_text_to_the_cache(self, make, tmp_path):
        short, long = write(tmp_path / "a.txt", "x" * 64), write(tmp_path / "b.txt", "x" * 65)
        for file, known in ((short, 3), (long, 4)):
            make(file).next_blocks(1)
            told = [json.loads(about.read_text())["text"][0] for about in tmp_path.rglob("source.json")]
            (mine,) = (text for text in told if text[0] == str(file))
            assert len(mine) == known


MEASURED = """
import resource, sys
from pathlib import Path
import pyarrow.parquet
import tiny
from flextron.data.blocks import load_blocks
from flextron.data.corpus import Corpus
tiny.tokenizer()("a")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cache, *files = sys.argv[1:]
for file in files:
    try:
        corpus = Corpus(tiny.tokenizer(), [file], block_tokens=64, shard_tokens=1 << 14, cache=Path(cache))
        print(*corpus.next_blocks(32).shape)
        if not file.endswith(".parquet"):
            load_blocks(tiny.tokenizer(), file, tokens=2048, block_tokens=64, max_characters=None)
    except Exception as error:
        print(type(error).__name__, error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_memory_is_bounded_whatever_a_text_is(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = [write(tmp_path / "large.txt", tiny.TEXT * (40_000_000 // len(tiny.TEXT)))]
    for name, start in (("expands.txt.xz", b""), ("expands.jsonl.xz", b'{"text": "')):
        files.append(tmp_path / name)
        with lzma.open(files[-1], "wb", preset=0) as file:
            file.write(start)
            for _ in range(60):
                file.write(b"a" * 1_000_000)
    files.append(tmp_path / "same.parquet")
    parquet.write_table(arrow.table({"text": ["word " * 1_000_000] * 80}), files[-1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    found = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / "cache", *files],
        capture_output=True, text=True, check=True, env=environment, timeout=100,
    )  # fmt: skip
    *said, megabytes = found.stdout.splitlines()
    assert [line for line in said if "longer than 16777216" not in line] == ["32 64"] * 3
    assert int(megabytes) < 300


class TestTokenizerInPython:
    def test_its_tokens_and_its_cache(self, make, numbers, tmp_path):
        tokenizer = ByT5Tokenizer()
        expected = make(numbers, tokenizer=tokenizer).next_blocks(9)
        ids = {token for text in NUMBERS for token in tokenizer(text).input_ids}
        assert set(expected.flatten().tolist()) <= ids
        tokenizer.save_pretrained(tmp_path / "saved")
        again = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert torch.equal(make(numbers, tokenizer=again).next_blocks(9), expected)
        assert len(list((tmp_path / "cache/tokens").iterdir())) == 1
        again.add_tokens(["1 2"])
        make(numbers, tokenizer=again).next_blocks(1)
        assert len(list((tmp_path / "cache/tokens").iterdir())) == 2


class TestMixing:
    @pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (5, 1, 1e-3), (0.1, 0.2, 0.3, 0.4)], ids=str)
    def test_shares_hold_at_every_length(self, make, tmp_path, weights):
        files = [write(tmp_path / f"{number}.txt", text) for number, text in enumerate(WORDS[: len(weights)])]
        corpus = make(*(f"{file}@{weight}" for file, weight in zip(files, weights, strict=True)))
        for drawn in range(1, 60):
            corpus.next_blocks(1)
            given = [position["given"] for position in corpus.state_dict()["positions"]]
            assert sum(given) == drawn
            for count, weight in zip(given, weights, strict=True):
                assert abs(count - drawn * weight / sum(weights)) < 1

    def test_each_block_is_of_its_source(self, make, numbers, words):
        corpus = make(f"{numbers}@2", words)
        blocks = corpus.next_blocks(9).tolist()
        mine = [block for part in epoch_blocks(NUMBERS) for block in part]
        assert [block in mine for block in blocks] == [True, False, True] * 3


class TestResume:
    @pytest.mark.parametrize("warm", [True, False])
    def test_goes_on_anywhere(self, make, numbers, words, tmp_path, warm):
        """Places drawn at random, over several epochs of both, and in the last and first block of shards."""
        sources = (f"{numbers}@3", words)
        total = 4 * count_blocks(NUMBERS)
        whole = make(*sources).next_blocks(total)
        draw = random.Random(0)  # noqa: S311
        for place in [0, 1, 5, 6, *(draw.randrange(total - 20) for _ in range(8))]:
            first = make(*sources)
            if place:
                first.next_blocks(place)
            state = json.loads(json.dumps(first.state_dict()))
            cache = tmp_path / ("cache" if warm else f"cold-{place}")
            second = make(*sources, cache=cache)
            second.load_state_dict(state)
            rest = torch.cat([second.next_blocks(count) for count in (1, 7, 12)])
            assert torch.equal(rest, whole[place : place + 20])

    def test_a_corpus_that_has_given_blocks_goes_back(self, make, numbers):
        corpus = make(numbers)
        corpus.next_blocks(3)
        state = corpus.state_dict()
        expected = corpus.next_blocks(30)
        corpus.load_state_dict(state)
        assert torch.equal(corpus.next_blocks(30), expected)

    def test_a_long_way_shows_a_bar(self, make, numbers, tmp_path, capsys):
        corpus = make(numbers)
        corpus.next_blocks(20)
        assert capsys.readouterr().err == ""
        cold = make(numbers, cache=tmp_path / "cold")
        cold.load_state_dict(corpus.state_dict())
        cold.next_blocks(1)
        assert f"tokenising {numbers}" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": 1}, "other seed: 0, not 1. Give the former ones, or start anew"),
            ({"block_tokens": T + 1}, "other block_tokens: 8, not 9"),
            ({"shard_tokens": SHARD + 1}, "other shard_tokens: 43, not 44"),
        ],
    )
    def test_other_settings(self, make, numbers, changes, message):
        with pytest.raises(FlextronError, match=message):
            make(numbers, **changes).load_state_dict(make(numbers).state_dict())

    def test_other_sources(self, make, numbers, words):
        state = make(numbers).state_dict()
        for others in ([words], [f"{numbers}@2"], [numbers, words]):
            with pytest.raises(FlextronError, match="other sources"):
                make(*others).load_state_dict(state)

    @pytest.mark.parametrize("place", [None, -1, 1.5, "1"])
    def test_garbled(self, make, numbers, place):
        corpus = make(numbers)
        state = corpus.state_dict()
        state["positions"][0]["place"] = place
        with pytest.raises(FlextronError, match="is garbled"):
            corpus.load_state_dict(state)
        with pytest.raises(FlextronError, match="is garbled"):
            corpus.load_state_dict({**state, "positions": []})
        with pytest.raises(FlextronError, match="other version: None, not 1"):
            corpus.load_state_dict({})

    @pytest.mark.parametrize("warm", [True, False])
    def test_a_text_that_was_longer(self, make, numbers, warm):
        corpus = make(numbers)
        corpus.next_blocks(20)
        state = corpus.state_dict()
        write(numbers, json_lines(NUMBERS[:2]))
        if warm:
            make(numbers).next_blocks(20)
        corpus = make(numbers)
        corpus.load_state_dict(state)
        with pytest.raises(FlextronError, match=r"numbers.jsonl has changed since .* it has no shard"):
            corpus.next_blocks(1)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, FlextronError])
    def test_a_draw_that_fails_changes_nothing(self, make, numbers, words, error, monkeypatch):
        expected = make(numbers, words).next_blocks(40)
        corpus = make(numbers, words, cache=numbers.parent / "other")
        corpus.next_blocks(4)
        state = corpus.state_dict()
        with monkeypatch.context() as patch:
            patch.setattr(corpus._readers[1].shards, "_tokenizer", fails(error))
            with pytest.raises(error):
                corpus.next_blocks(36)
        assert corpus.state_dict() == state
        assert torch.equal(corpus.next_blocks(36), expected[4:])


def fails(error):
    class Tokenizer:
        def __call__(self, *_, **__):
            raise error

    return Tokenizer()


class TestCache:
    def test_tokenised_once_for_all_sizes_and_seeds(self, make, numbers, monkeypatch):
        make(numbers).next_blocks(count_blocks(NUMBERS) + 5)
        monkeypatch.setattr(sources_module, "pieces", pytest.fail)
        assert len(make(numbers, block_tokens=5, seed=3).next_blocks(100)) == 100

    def test_reads_no_more_than_it_needs(self, make, tmp_path):
        file = write(tmp_path / "a.jsonl", json_lines(NUMBERS) + "broken")
        corpus = make(file)
        first = len(epoch_blocks(NUMBERS)[0])
        corpus.next_blocks(first)
        assert len(shard_files(tmp_path)) == 1
        for _ in range(2):
            with pytest.raises(FlextronError, match=r"a.jsonl, line 21"):
                corpus.next_blocks(1000)

    def test_says_what_it_is(self, make, numbers, tmp_path):
        make(numbers).next_blocks(1)
        (about,) = tmp_path.rglob("source.json")
        stat = numbers.stat()
        told = json.loads(about.read_text())
        assert told["text"] == [[str(numbers), stat.st_size, stat.st_mtime_ns]]
        assert told["shard_tokens"] == SHARD

    def test_other_text_other_tokens(self, make, numbers):
        make(numbers).next_blocks(20)
        write(numbers, json_lines(NUMBERS[::-1]))
        assert sorted(make(numbers).next_blocks(5).tolist()) == sorted(epoch_blocks(NUMBERS[::-1])[0])

    def test_other_tokenizer_other_tokens(self, make, numbers):
        make(numbers).next_blocks(20)
        alone = Tokenizer(tiny.models.WordLevel({"!": 0, "?": 1, "0": 2}, unk_token="?"))  # noqa: S106
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=alone, eos_token="!")  # noqa: S106
        assert document_end(tokenizer) == document_end(tiny.tokenizer())
        assert set(make(numbers, tokenizer=tokenizer).next_blocks(3).flatten().tolist()) <= {0, 1, 2}

    def test_a_limit_of_the_tokenizer_cuts_nothing_and_is_the_same_tokenizer(self, make, numbers, tmp_path):
        backend = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
        backend.enable_truncation(5)
        limited = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")  # noqa: S106
        plain = make(numbers).next_blocks(20)
        assert torch.equal(make(numbers, tokenizer=limited).next_blocks(20), plain)
        assert len(list((tmp_path / "cache/tokens").iterdir())) == 1

    @pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "U16"), ((1 << 16) + 1, "I32")])
    def test_two_bytes_a_token_where_they_do(self, make, tmp_path, size, dtype):
        vocabulary = {f"w{number}": number for number in range(size)}
        backend = Tokenizer(tiny.models.WordLevel(vocabulary))
        backend.pre_tokenizer = tiny.pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0")  # noqa: S106
        file = write(tmp_path / "a.txt", f"w{size - 1} " * T)
        assert make(file, tokenizer=tokenizer).next_blocks(1).tolist() == [[size - 1] * T]
        with safe_open(shard_files(tmp_path)[0], "pt") as shard:
            assert shard.get_slice("tokens").get_dtype() == dtype

    @pytest.mark.parametrize("damage", ["gone", "empty", "truncated", "flipped", "metadata"])
    @pytest.mark.parametrize("number", [0, 2, -1])
    def test_a_broken_shard_is_made_again(self, make, numbers, tmp_path, damage, number):
        expected = make(numbers).next_blocks(60)
        file = shard_files(tmp_path)[number]
        whole = content(file)
        others = {other: other.stat().st_mtime_ns for other in shard_files(tmp_path) if other != file}
        if damage == "gone":
            file.unlink()
        else:
            broken = damaged(file.read_bytes(), damage)
            assert broken != file.read_bytes()
            file.write_bytes(broken)
        assert torch.equal(make(numbers).next_blocks(60), expected)
        assert content(file) == whole
        assert others == {other: other.stat().st_mtime_ns for other in others}

    def test_makes_only_what_is_missing(self, make, numbers, tmp_path):
        corpus = make(numbers)
        corpus.next_blocks(5 * 5)
        state, files = corpus.state_dict(), shard_files(tmp_path)
        expected = corpus.next_blocks(1)
        before = [file.stat().st_mtime_ns for file in files]
        for file in files[3:]:
            file.unlink()
        corpus = make(numbers)
        corpus.load_state_dict(state)
        assert torch.equal(corpus.next_blocks(1), expected)
        after = [file.stat().st_mtime_ns for file in files]
        assert [old == new for old, new in zip(before, after, strict=True)] == [True] * 3 + [False] * (len(files) - 3)

    def test_corpora_that_share_a_cache_by_turns(self, make, numbers, tmp_path):
        expected = make(numbers).next_blocks(80)
        first, second = make(numbers, cache=tmp_path / "shared"), make(numbers, cache=tmp_path / "shared")
        firsts, seconds = [], []
        for one, two in [(3, 14), (23, 2), (30, 40), (24, 24)]:
            firsts.append(first.next_blocks(one))
            seconds.append(second.next_blocks(two))
        assert torch.equal(torch.cat(firsts), expected)
        assert torch.equal(torch.cat(seconds), expected)

    def test_a_disk_that_is_full(self, make, numbers, tmp_path):
        expected = make(numbers, shard_tokens=800).next_blocks(10)
        corpus = make(numbers, cache=tmp_path / "full", shard_tokens=800)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as near to it as a test comes; source.json still fits
        try:
            with pytest.raises(CheckpointError) as error:
                corpus.next_blocks(10)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(error.value).startswith("cannot write tokenised text to ")
        assert str(error.value).endswith(
            ".safetensors: File too large. Free some space, or name another folder for the cache."
        )
        assert [file.name for file in (tmp_path / "full").rglob("*") if file.is_file()] == ["source.json"]
        assert torch.equal(corpus.next_blocks(10), expected)

    def test_no_folder_for_it(self, make, numbers):
        with pytest.raises(CheckpointError, match=r"cannot write tokenised text to .*: Not a directory"):
            make(numbers, cache=numbers / "x").next_blocks(1)

    @pytest.mark.parametrize(
        ("variables", "folder"),
        [
            ({"FLEXTRON_CACHE": "own", "XDG_CACHE_HOME": "xdg", "HOME": "home"}, "own/tokens"),
            ({"XDG_CACHE_HOME": "xdg", "HOME": "home"}, "xdg/flextron/tokens"),
            ({"HOME": "home"}, "home/.cache/flextron/tokens"),
        ],
        ids=["own", "xdg", "home"],
    )
    def test_where_it_is_by_default(self, make, numbers, tmp_path, monkeypatch, variables, folder):
        for name in ("FLEXTRON_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(tmp_path / value))
        make(numbers, cache=None).next_blocks(1)
        assert len(shard_files(tmp_path / folder)) == 1


def content(file) -> tuple[dict[str, str], list[int]]:
    with safe_open(file, "pt") as shard:
        return shard.metadata(), shard.get_tensor("tokens").tolist()


def damaged(whole: bytes, damage: str) -> bytes:
    if damage == "flipped":
        return whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    if damage == "metadata":
        return re.sub(rb'(?<="documents":")\d', b"8", whole)
    return {"empty": b"", "truncated": whole[: len(whole) // 2]}[damage]


class TestFiles:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz"])
    def test_compressed(self, make, tmp_path, name):
        drawn = make(write(tmp_path / name, json_lines(NUMBERS))).next_blocks(5)
        assert sorted(drawn.tolist()) == sorted(epoch_blocks(NUMBERS)[0])

    @pytest.mark.parametrize("pattern", ["text", "text/**/*", "text/*/*.*", "text/[sp]*/*"])
    def test_folders_and_globs_in_the_order_of_names(self, make, tmp_path, pattern):
        write(tmp_path / "text/sub/b.txt.gz", NUMBERS[1])
        write(tmp_path / "text/sub/a.jsonl", json_lines([NUMBERS[0], NUMBERS[5]]))
        write(tmp_path / "text/part/c.md", NUMBERS[2])
        write(tmp_path / "text/sub/z.json", "{}")
        write(tmp_path / "text/sub/.hidden.txt", "hidden")
        texts = [NUMBERS[2], NUMBERS[0], NUMBERS[5], NUMBERS[1]]
        corpus = make(tmp_path / pattern)
        assert sorted(corpus.next_blocks(5).tolist()) == sorted(epoch_blocks(texts)[0])
        rest = [block for blocks in epoch_blocks(texts)[1:] for block in blocks]
        assert sorted(corpus.next_blocks(len(rest)).tolist()) == sorted(rest)

    def test_a_glob_from_here(self, make, numbers, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert torch.equal(make("num*.jsonl").next_blocks(9), make(numbers).next_blocks(9))

    @pytest.mark.parametrize("name", ["gone.txt", "*.txt", "folder", "folder/**"])
    def test_nothing_there(self, make, tmp_path, name):
        write(tmp_path / "folder/a.json", "{}")
        with pytest.raises(FlextronError) as error:
            make(tmp_path / name)
        assert str(error.value) == (
            f"no text at {tmp_path / name}. Name a file (.jsonl, .txt, .md (each also .xz, .gz, .bz2) or .parquet), "
            "a folder or glob of them, or sample/train."
        )

    def test_empty_and_garbled(self, make, tmp_path):
        with pytest.raises(FlextronError, match=r"a.txt is empty"):
            make(write(tmp_path / "a.txt", "")).next_blocks(1)
        with pytest.raises(FlextronError, match=r"cannot read .*b.txt.gz: "):
            make(shorten(write(tmp_path / "b.txt.gz", NUMBERS[0]))).next_blocks(1)


def shorten(file):
    file.write_bytes(file.read_bytes()[:-10])
    return file


class TestParquet:
    @pytest.fixture
    def table(self, tmp_path):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")

        def write(**columns):
            parquet.write_table(arrow.table(columns), tmp_path / "a.parquet", row_group_size=3)
            return tmp_path / "a.parquet"

        return write

    def refusal(self, corpus) -> str:
        with pytest.raises(FlextronError) as error:
            corpus.next_blocks(1)
        return str(error.value)

    def test_the_same_as_json_lines(self, make, table, numbers):
        file = table(other=list(range(20)), text=NUMBERS)
        assert torch.equal(make(file).next_blocks(50), make(numbers).next_blocks(50))
        assert torch.equal(make(file.parent / "*.parquet").next_blocks(50), make(numbers).next_blocks(50))

    def test_no_text(self, make, table):
        file = table(content=["a"], id=[1])
        assert self.refusal(make(file)) == (
            f'{file} has no column "text" but content, id. Rename the one that holds the text.'
        )
        assert self.refusal(make(table(text=["a", None]))) == f'{file}, row 2: "text" is a NoneType, not a string.'
        assert self.refusal(make(table(text=[" "]))) == f"{file} is empty."
        assert self.refusal(make(table(text=[]))) == f"{file} is empty."
        assert self.refusal(make(table(text=[1, 2]))) == f'{file}: the column "text" is of type int64, not string.'
        assert self.refusal(make(table(text=[b"a"]))) == f'{file}: the column "text" is of type binary, not string.'

    def test_garbled(self, make, table):
        file = shorten(table(text=NUMBERS))
        assert self.refusal(make(file)).startswith(f"cannot read {file}: Parquet magic bytes not found")

    def test_without_pyarrow(self, make, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        message = self.refusal(make(write(tmp_path / "a.parquet", "")))
        assert message.startswith(f"cannot read {tmp_path}/a.parquet: ")
        assert message.endswith('Run: pip install "flextron[data]"')


class TestDatasets:
    @pytest.fixture(autouse=True)
    def offline(self, tmp_path, monkeypatch, request):
        if "without" not in request.node.name:
            datasets = pytest.importorskip("datasets")
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
            monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def test_a_folder_with_splits(self, make, tmp_path, numbers, words):
        write(tmp_path / "set/train.jsonl", json_lines(NUMBERS))
        write(tmp_path / "set/test.jsonl", json_lines(WORDS))
        same = [(f"datasets:{tmp_path}/set", numbers), (f"datasets:{tmp_path}/set,,test", words)]
        for name, file in same:
            assert torch.equal(make(name).next_blocks(20), make(file).next_blocks(20))

    def test_another_version_of_a_folder(self, make, tmp_path):
        for texts in (NUMBERS, WORDS):
            write(tmp_path / "set/train.jsonl", json_lines(texts))
            drawn = make(f"datasets:{tmp_path}/set").next_blocks(5)
            assert sorted(drawn.tolist()) == sorted(epoch_blocks(texts)[0])

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("set,,valid", "Bad split: valid"),
            ("set,other", "BuilderConfig 'other' not found"),
            ("gone", "Couldn't find any data file"),
        ],
    )
    def test_no_such_dataset(self, make, tmp_path, name, message):
        write(tmp_path / "set/train.jsonl", '{"content": "a"}\n')
        with pytest.raises(FlextronError) as error:
            make(f"datasets:{tmp_path}/{name}").next_blocks(1)
        assert str(error.value).startswith(f"cannot read datasets:{tmp_path}/{name}: {message}")
        assert "\n" not in str(error.value)

    def test_a_hub_that_is_out_of_reach(self, make):
        with pytest.raises(FlextronError, match="cannot read datasets:nobody/nothing: Couldn't reach"):
            make("datasets:nobody/nothing").next_blocks(1)

    def test_no_text(self, make, tmp_path):
        write(tmp_path / "set/train.jsonl", '{"content": "a", "id": 1}\n')
        with pytest.raises(FlextronError, match=r'has no column "text" but content, id. Rename'):
            make(f"datasets:{tmp_path}/set").next_blocks(1)

    @pytest.mark.parametrize("name", ["", ",a", "a,b,c,d"])
    def test_names_that_are_none_without_datasets(self, make, name):
        with pytest.raises(ValueError, match=r"as a dataset; write datasets:NAME\[,CONFIG\[,SPLIT\]\]"):
            make(f"datasets:{name}")

    def test_without_datasets(self, make, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(FlextronError, match=r'cannot read datasets:a: .*pip install "flextron\[data\]"'):
            make("datasets:a").next_blocks(1)


class TestPositions:
    def test_as_a_plain_loop(self):
        tokens = tiny.token_ids(rows=5, time=40, vocab=6)
        tokens[0] = 3
        tokens[1] = 4
        for end in (3, 5, 99):
            assert positions(tokens, end).tolist() == [plain_positions(row, end) for row in tokens.tolist()]

    def test_one_token(self):
        assert positions(torch.tensor([[3]]), 3).tolist() == [[0]]


def plain_positions(row: list[int], end: int) -> list[int]:
    result, place = [], 0
    for token in row:
        result.append(place)
        place = 0 if token == end else place + 1
    return result
