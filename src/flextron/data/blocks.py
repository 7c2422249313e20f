"""Turn text into N blocks of T tokens. Documents follow one another, and one token ends each."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase

from flextron.errors import CheckpointError, FlextronError, TooLittleTextError

SAMPLES = ("sample/train", "sample/validation")
BATCH_TOKENS = 2048
"""Tokens in one forward pass: enough to keep a processor busy, few enough that their logits fit in memory."""
GPU_BATCHES = 16
"""A GPU gets this many times more tokens, because small matrices leave it idle."""
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
TEXT_ENDINGS = (".jsonl", ".txt", ".md")
"""What is read as text; each may be compressed, too."""
ENDINGS = f"{', '.join(TEXT_ENDINGS)} (each also {', '.join(_OPENERS)})"


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
    start, end = document_start(tokenizer), document_end(tokenizer)
    wanted = tokens // block_tokens * block_tokens
    ids: list[int] = []
    sizes: list[int] = []
    read = 0
    for read, document in enumerate(documents(text), start=1):
        if read <= skip_documents:
            continue
        document_ids, document_sizes = _tokenise(tokenizer, document[:max_characters])
        ids += [*start, *document_ids, end]
        sizes += [*(0 for _ in start), *document_sizes, 0]
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
    """Yield the documents of a text file in order.

    Raises:
        FlextronError: the file is missing or empty, is not UTF-8 or JSON Lines, or has a line without `text`.
    """
    path = _path(text)
    empty = True
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
            for document in _read(file, path):
                empty = empty and not document.strip()
                yield document
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise FlextronError(f"cannot read {text}: {error}") from None
    if empty:
        raise FlextronError(f"{text} is empty.")


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


def _read(file: TextIO, path: Path) -> Iterator[str]:
    if _ending(path) != ".jsonl":
        yield file.read()
        return
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
            raise FlextronError(f'{path}, line {number}: not a JSON object with a "text" field ({error}).') from None
        if not isinstance(document, str):
            raise FlextronError(f'{path}, line {number}: "text" is a {type(document).__name__}, not a string.')
        if any("\ud800" <= character <= "\udfff" for character in document):
            raise FlextronError(f"{path}, line {number}: half of a surrogate pair, which is no character.")
        yield document


def _tokenise(tokenizer: PreTrainedTokenizerBase, document: str) -> tuple[list[int], list[int]]:
    """Token ids and the bytes that each adds. If tokens share a character, the first gets all its bytes."""
    encoded = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    sizes = []
    seen = 0
    for _, end in encoded["offset_mapping"]:
        sizes.append(len(document[seen:end].encode("utf8")))
        seen = max(seen, end)
    return encoded["input_ids"], sizes
