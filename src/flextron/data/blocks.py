"""Turn text into N blocks of T tokens. Documents follow one another, and one token ends each."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from transformers import PreTrainedTokenizerBase

from flextron.errors import CheckpointError, FlextronError, TooLittleTextError

SAMPLES = ("sample/train", "sample/validation")
BATCH_TOKENS = 2048
"""Tokens in one forward pass: enough to keep a processor busy, few enough that their logits fit in memory."""
GPU_BATCHES = 16
"""A GPU gets this many times more tokens, because small matrices leave it idle."""
PIECE = 1 << 18
"""Characters that are read and tokenised at once: a tokenizer takes some 200 bytes of memory for each."""
LONGEST_LINE = 1 << 24
"""Characters that a line of JSON may have: it is read whole, and takes up to 50 bytes of memory for each."""
_HALF = re.compile("[\ud800-\udfff]")
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
TEXT_ENDINGS = (".jsonl", ".txt", ".md")
"""What is read as text; each may be compressed, too."""
ENDINGS = f"{', '.join(TEXT_ENDINGS)} (each also {', '.join(_OPENERS)})"


class Piece(NamedTuple):
    """At most PIECE characters of a document. A shorter document is one piece."""

    text: str
    first: bool
    """Whether the document starts here."""
    last: bool
    """Whether the document ends here."""


@dataclass(frozen=True)
class TokenBlocks:
    """Token blocks of one text, and the number of bytes of text behind each token."""

    tokens: torch.Tensor  # [N, T] int64
    bytes: torch.Tensor  # [N, T] int64
    text: str
    """Where the text came from."""
    documents: int = 0
    """Number of documents that were read, including skipped ones."""

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens that a language model predicts here: all but the first of each block."""
        return self.tokens[:, 1:].numel()

    @property
    def predicted_bytes(self) -> int:
        """Bytes of text behind the predicted tokens."""
        return int(self.bytes[:, 1:].sum())

    def batches(self, max_tokens: int) -> Iterator[torch.Tensor]:
        """Yield consecutive blocks, [B, T], with at most `max_tokens` tokens in each batch but at least one block."""
        return iter(torch.split(self.tokens, max(1, max_tokens // self.tokens.shape[1])))


def batch_tokens(device: torch.device, on_cpu: int = BATCH_TOKENS) -> int:
    """Tokens for one forward pass on a device. A CPU gets `on_cpu`, a GPU more."""
    return on_cpu if device.type == "cpu" else GPU_BATCHES * on_cpu


def load_blocks(
    tokenizer: PreTrainedTokenizerBase | None,
    text: str | Path,
    *,
    tokens: int,
    block_tokens: int = 512,
    max_characters: int | None = 4000,
    skip_documents: int = 0,
) -> TokenBlocks:
    """Read the first `tokens` tokens of a text as blocks. A shorter text gives fewer, but at least one block.

    Args:
        text: a .txt or .md file (one document), or a .jsonl file with a `text` field in each line, also as .xz or .gz;
            or a sample that comes with flextron: sample/train, sample/validation.
        skip_documents: how many documents to skip at the start.
        max_characters: cut each document here, so that one book does not fill all blocks; None for no cut.

    Raises:
        FlextronError: there is no tokenizer, the file is missing or cannot be read, or it holds less than one block.
    """
    tokenizer = require_tokenizer(tokenizer)
    if block_tokens < 2 or tokens < block_tokens:
        raise ValueError(f"need blocks of at least 2 tokens and one whole block, got {tokens} in {block_tokens}s.")
    if max_characters is not None and max_characters < 1:
        raise ValueError(f"max_characters is {max_characters}; give at least 1, or None to cut nothing.")
    start, end = document_start(tokenizer), document_end(tokenizer)
    wanted = tokens // block_tokens * block_tokens
    ids: list[int] = []
    sizes: list[int] = []
    read = 0
    for piece in pieces(text, max_characters=max_characters):
        read += piece.first
        if read <= skip_documents:
            continue
        piece_ids, piece_sizes = _tokenise(tokenizer, piece.text)
        ids += [*(start if piece.first else ()), *piece_ids, *([end] if piece.last else ())]
        sizes += [*(0 for _ in start if piece.first), *piece_sizes, *([0] if piece.last else ())]
        if len(ids) >= wanted:
            break
    whole = min(wanted, len(ids) // block_tokens * block_tokens)
    if not whole:
        raise TooLittleTextError(
            f"{text} holds {len(ids)} tokens, less than one block of {block_tokens}. "
            "Give a longer text or a smaller block size."
        )
    shape = (-1, block_tokens)
    return TokenBlocks(torch.tensor(ids[:whole]).view(shape), torch.tensor(sizes[:whole]).view(shape), str(text), read)


def blocks_after(
    tokenizer: PreTrainedTokenizerBase | None, text: str | Path, documents: int, **options: Any
) -> TokenBlocks:
    """Read a text as `load_blocks` after so many documents; from its start if too little would remain.

    Raises:
        FlextronError: as `load_blocks`.
    """
    try:
        return load_blocks(tokenizer, text, **options, skip_documents=documents)
    except TooLittleTextError:
        return load_blocks(tokenizer, text, **options)


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        FlextronError: it has none.
    """
    if tokenizer is None:
        raise FlextronError("this checkpoint has no tokenizer; put its tokenizer files into the same folder.")
    return tokenizer


def documents(text: str | Path) -> Iterator[str]:
    """Yield the documents of a text file in order, each whole. `pieces` takes less memory, and says what is raised."""
    parts: list[str] = []
    for piece in pieces(text):
        parts.append(piece.text)
        if piece.last:
            yield "".join(parts)
            parts = []


def pieces(text: str | Path, *, max_characters: int | None = None) -> Iterator[Piece]:
    """Yield the documents of a text file in order, in pieces, so that a text of any size takes little memory.

    Args:
        max_characters: cut each document here.

    Raises:
        FlextronError: the file is missing or empty, is not UTF-8 or JSON Lines, or has a line that is too long or
            without `text`.
    """
    path = _path(text)
    empty = True
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
            for piece in _read(file, path, max_characters):
                empty = empty and not piece.text.strip()
                yield piece
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise FlextronError(f"cannot read {text}: {error}") from None
    if empty:
        raise FlextronError(f"{text} is empty.")


def in_pieces(document: str | TextIO, max_characters: int | None = None) -> Iterator[Piece]:
    """Yield a document, or a file that is one, in pieces that end where a line does; where none does, at a blank."""
    file = StringIO(document) if isinstance(document, str) else document
    rest, first = "", True
    left = sys.maxsize if max_characters is None else max_characters
    while True:
        wanted = min(PIECE - len(rest), left)
        read = file.read(wanted)
        left -= len(read)
        rest += read
        if len(read) < wanted or not left:
            yield Piece(rest, first, last=True)
            return
        end = rest.rfind("\n") + 1 or rest.rfind(" ")
        cut = end if end > 0 else PIECE
        yield Piece(rest[:cut], first, last=False)
        rest, first = rest[cut:], False


def document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer starts every text with it, as those of Gemma and Llama do; else []."""
    alone = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if alone[:1] == [tokenizer.bos_token_id] else []


def document_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a document: <|endoftext|> if there is one (chat models have another EOS), else EOS.

    Raises:
        CheckpointError: the tokenizer has neither of them.
    """
    end = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if end is None:
        raise CheckpointError("this tokenizer has no token that ends a text; set its eos_token.")
    return int(end)


def _path(text: str | Path) -> Path:
    if str(text) in SAMPLES:
        return Path(str(resources.files("flextron") / f"{text}.jsonl.xz"))
    path = Path(text)
    if not path.is_file():
        raise FlextronError(f"no such text file: {text}. Name a file that ends in {ENDINGS}, or {SAMPLES[0]}.")
    if _ending(path) not in TEXT_ENDINGS:
        raise FlextronError(f"{text} is not read as text: its name must end in {ENDINGS}. Convert it.")
    return path


def _ending(path: Path) -> str:
    """The ending that says what is inside, without that of the compression."""
    return Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix


def _read(file: TextIO, path: Path, max_characters: int | None) -> Iterator[Piece]:
    if _ending(path) != ".jsonl":
        yield from in_pieces(file, max_characters)
        return
    lines = iter(partial(file.readline, LONGEST_LINE + 1), "")
    for number, line in enumerate(lines, start=1):
        if len(line) > LONGEST_LINE:
            raise FlextronError(
                f"{path}, line {number} is longer than {LONGEST_LINE} characters, the most that a line may have. "
                "Write its text into a .txt file, which may be of any size."
            )
        if line.strip():
            yield from in_pieces(_document(line, path, number), max_characters)


def _document(line: str, path: Path, number: int) -> str:
    """The text in a line of JSON."""
    try:
        document = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FlextronError(f'{path}, line {number}: not a JSON object with a "text" field ({error}).') from None
    if not isinstance(document, str):
        raise FlextronError(f'{path}, line {number}: "text" is a {type(document).__name__}, not a string.')
    if _HALF.search(document):
        raise FlextronError(f"{path}, line {number}: half of a surrogate pair, which is no character.")
    return document


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Token ids and the bytes that each adds. If tokens share a character, the first gets all its bytes.

    A tokenizer written in Python does not say where its tokens are in the text: they get equal parts of its bytes.
    """
    offsets = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, **offsets)
    ids: list[int] = encoded["input_ids"]
    if not offsets:
        bytes_ = len(text.encode("utf8"))
        return ids, [bytes_ * (place + 1) // len(ids) - bytes_ * place // len(ids) for place in range(len(ids))]
    sizes = []
    seen = 0
    for _, end in encoded["offset_mapping"]:
        sizes.append(len(text[seen:end].encode("utf8")))
        seen = max(seen, end)
    return ids, sizes
