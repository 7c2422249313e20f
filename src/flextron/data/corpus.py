"""Turn texts of any size into blocks of tokens, in a fixed order that can resume anywhere. B blocks of T tokens."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from transformers import PreTrainedTokenizerBase

from flextron.data.blocks import Piece, document_end, document_start, require_tokenizer
from flextron.data.sources import Source, open_source
from flextron.errors import CheckpointError, FlextronError, TooLittleTextError
from flextron.progress import bar

VERSION = 1
"""Version of the cache's files and of saved positions."""
GROUP_CHARACTERS = 1 << 18
"""Characters to tokenise at once, at least: many documents, so that the tokenizer uses all cores."""

_OF_THE_PLACE = re.compile(r"^name_or_path$|_file$|local|^model_max_length$")
"""Settings of a tokenizer that change where it is loaded from, or that are not used here."""


class Corpus:
    """Blocks of tokens from weighted sources, in a fixed order that can resume anywhere.

    Documents follow one another, one token ends each, and a document that does not fit continues in the next block.
    Each shard of a source is tokenised once, when it is first needed, into `cache` (2 or 4 bytes a token). Shards come
    in the order of the text, and the blocks of a shard in a seeded order. A rest of less than a block at the end of a
    shard is not used. A text that ends is read again in another order.

    The next block comes from the source that lags most behind its weight, so no source is ever a whole block ahead of
    its share. One shard of each source is in memory.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        sources: Sequence[str | Source],
        *,
        block_tokens: int,
        seed: int = 0,
        cache: Path | None = None,
        shard_tokens: int = 1 << 19,
    ) -> None:
        """Find the files of all sources. This reads no text yet.

        Args:
            cache: folder for tokenised text, which all corpora share. The default is $FLEXTRON_CACHE, then the user's
                cache. It finds a dataset of a hub by name, so it does not notice a newer version.
            shard_tokens: number of tokens that are tokenised, stored and shuffled together.

        Raises:
            FlextronError: there is no tokenizer, or a source is missing.
            ValueError: there is no source, a source is named twice, a weight is bad, the seed is negative, or a block
                is larger than a shard.
        """
        tokenizer = require_tokenizer(tokenizer)
        if not 2 <= block_tokens <= shard_tokens or seed < 0:
            raise ValueError(
                f"got blocks of {block_tokens} tokens, shards of {shard_tokens} and seed {seed}; "
                "a block is 2 tokens to a whole shard, a seed is 0 or more."
            )
        self._sources = [source if isinstance(source, Source) else Source.parse(source) for source in sources]
        _check_paths([source.path for source in self._sources])
        self._settings = {"block_tokens": block_tokens, "seed": seed, "shard_tokens": shard_tokens}
        folder = (cache or _default_cache()) / "tokens"
        total = sum(source.weight for source in self._sources)
        self._readers = []
        for index, source in enumerate(self._sources):
            shards = _Shards(source.path, tokenizer, folder, shard_tokens)
            self._readers.append(_Reader(shards, source.weight / total, block_tokens, (seed, index)))

    def next_blocks(self, count: int) -> torch.Tensor:
        """The next `count` blocks, [count, T] int64. After an error or Ctrl-C the position is as before.

        Raises:
            FlextronError: a text cannot be read, is empty, or has changed since the position was saved.
            TooLittleTextError: a source has less than one block.
            CheckpointError: the cache cannot be written, for example because the disk is full.
        """
        if count < 1:
            raise ValueError(f"got {count} blocks to draw; it must be at least 1.")
        before = [reader.position for reader in self._readers]
        try:
            blocks = [self._most_behind().next_block() for _ in range(count)]
        except BaseException:  # Ctrl-C too: a position that is saved now skips no block
            for reader, position in zip(self._readers, before, strict=True):
                reader.position = position
            raise
        return torch.from_numpy(np.stack(blocks).astype(np.int64))

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON, with the settings for which it is valid."""
        return {**self._identity(), "positions": [asdict(reader.position) for reader in self._readers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state`, which a corpus with the same sources and settings has saved.

        Raises:
            FlextronError: `state` has other sources, weights, sizes or seed, or makes no sense.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise FlextronError(
                    f"this position in the text has other {name}: {state.get(name)}, not {mine}. "
                    "Give the former ones, or start anew."
                )
        try:
            positions = [_Position(**position) for position in state["positions"]]
            pairs = list(zip(self._readers, positions, strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise FlextronError(f"this position in the text is garbled ({error}). Start anew.") from None
        for reader, position in pairs:
            reader.position = position

    @property
    def epochs(self) -> dict[str, int]:
        """For each path, how often its text was read to the end before the latest block. Above 0 the text repeats."""
        return {reader.shards.path: reader.position.epoch for reader in self._readers}

    def _identity(self) -> dict[str, Any]:
        return {"version": VERSION, "sources": [asdict(source) for source in self._sources], **self._settings}

    def _most_behind(self) -> _Reader:
        """The reader whose source would lag most if another source gave the next block. The first wins a tie."""
        number = 1 + sum(reader.position.given for reader in self._readers)
        return max(self._readers, key=lambda reader: reader.share * number - reader.position.given)


def positions(tokens_BT: torch.Tensor, end: int) -> torch.Tensor:
    """Position of each token in its document, [B, T] int64: 0 after each `end` and at the start of each block."""
    places_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand(tokens_BT.shape)
    begins_BT = torch.nn.functional.pad(tokens_BT[:, :-1] == end, (1, 0))
    return places_BT - (places_BT * begins_BT).cummax(1).values


@dataclass(frozen=True)
class _Position:
    """How far a source has been read."""

    given: int = 0
    """Blocks read since the start, including earlier epochs."""
    epoch: int = 0
    shard: int = 0
    place: int = 0
    """Blocks read of the current shard."""

    def __post_init__(self) -> None:
        if not all(type(value) is int and value >= 0 for value in vars(self).values()):
            raise ValueError(f"got {vars(self)}, want whole numbers from 0 up")


class _Reader:
    """The endless sequence of blocks of one source."""

    def __init__(self, shards: _Shards, share: float, block_tokens: int, seed: tuple[int, int]) -> None:
        self.position = _Position()
        self.shards, self.share = shards, share
        self._block_tokens, self._seed = block_tokens, seed
        self._held: tuple[int, _Shard] | None = None

    def next_block(self) -> NDArray[Any]:
        """The next block, [T]."""
        while True:
            now = self.position
            shard = self._shard(now.shard)
            blocks = len(shard.tokens) // self._block_tokens
            if now.place < blocks:
                break
            self.position = self._after(shard, blocks)
        order = np.random.default_rng([*self._seed, now.epoch, now.shard]).permutation(blocks)
        start = int(order[now.place]) * self._block_tokens
        self.position = replace(now, given=now.given + 1, place=now.place + 1)
        return shard.tokens[start : start + self._block_tokens]

    def _after(self, shard: _Shard, blocks: int) -> _Position:
        """The position at the start of the next shard."""
        now = self.position
        if not shard.last:
            return replace(now, shard=now.shard + 1, place=0)
        if now.shard == 0 and blocks == 0:
            raise TooLittleTextError(
                f"{self.shards.path} holds {len(shard.tokens)} tokens, less than one block of {self._block_tokens}. "
                "Give a longer text or a smaller block size."
            )
        return replace(now, epoch=now.epoch + 1, shard=0, place=0)

    def _shard(self, number: int) -> _Shard:
        if self._held is None or self._held[0] != number:
            self._held = None  # one shard in memory, not two
            self._held = (number, self.shards.shard(number))
        return self._held[1]


@dataclass(frozen=True)
class _Shard:
    tokens: NDArray[Any]
    documents: int
    """Documents of the source that end in this shard or before."""
    begun: int
    """Tokens of the next document that are in this shard or before."""
    last: bool
    """Whether the text ends in this shard."""

    @property
    def about(self) -> dict[str, str]:
        """The other fields as metadata of the file, with a checksum of everything."""
        about = {"version": str(VERSION), "documents": str(self.documents), "begun": str(self.begun)}
        about |= {"last": str(self.last).lower(), "count": str(len(self.tokens)), "dtype": str(self.tokens.dtype)}
        return about | {"checksum": str(zlib.crc32(self.tokens.tobytes(), zlib.crc32(json.dumps(about).encode())))}


class _Shards:
    """The tokens of one source in shards. Each shard is made from the text once, then read from its file.

    Files appear whole or not at all, and each can be made again alone, so several processes may share a folder.
    """

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, folder: Path, shard_tokens: int) -> None:
        self.path = path
        self._texts: Callable[[], Iterator[Piece]]
        self._texts, identity = open_source(path)
        self._tokenizer, self._size = tokenizer, shard_tokens
        self._start, self._end = document_start(tokenizer), document_end(tokenizer)
        about = {"version": VERSION, "shard_tokens": shard_tokens, "start": self._start, "end": self._end}
        about |= {"tokenizer": _fingerprint(tokenizer), "text": identity}
        self._about = json.dumps(about, indent=1)
        self._folder = folder / hashlib.sha256(self._about.encode()).hexdigest()[:32]
        self._coming: Iterator[_Shard] = iter(())
        self._number: int | None = None  # of the shard that `_coming` gives next

    def shard(self, number: int) -> _Shard:
        """Read shard `number` from its file. If the file is missing or damaged, make it and any missing ones before."""
        found = self._load(number)
        if found is not None:
            return found
        first = number if number == self._number else self._reopen(number)
        with bar(number - first, description=f"tokenising {self.path}", show=number > first) as advance:
            for earlier in range(first, number):
                self._make(earlier)
                advance()
        return self._make(number)

    def _reopen(self, number: int) -> int:
        """Prepare to make the shards after the last intact file before `number`. Returns the first one's number."""
        before = None
        while number and (before := self._load(number - 1)) is None:
            number -= 1
        self._coming = self._pack(before)
        return number

    def _make(self, number: int) -> _Shard:
        self._number = None  # an interrupted generator yields nothing more
        shard = next(self._coming, None)
        if shard is None:
            raise FlextronError(
                f"{self.path} has changed since this position in it was saved: it has no shard {number} of "
                f"{self._size} tokens any more. Give the former text, or start anew."
            )
        if number == 0:
            _write(self._folder / "source.json", self._about.encode())
        _write(self._file(number), save({"tokens": shard.tokens}, metadata=shard.about))
        self._number = number + 1
        return shard

    def _load(self, number: int) -> _Shard | None:
        """Read a shard from the cache. Returns None if its file is missing or damaged."""
        try:
            with safe_open(self._file(number), "numpy") as file:
                about, tokens = file.metadata(), file.get_tensor("tokens")
            shard = _Shard(tokens, int(about["documents"]), int(about["begun"]), about["last"] == "true")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return shard if shard.about == about else None

    def _file(self, number: int) -> Path:
        return self._folder / f"shard-{number:05}.safetensors"

    def _pack(self, before: _Shard | None) -> Iterator[_Shard]:
        """Yield the shards that follow `before`. All but the last are full."""
        done, begun = (before.documents, before.begun) if before else (0, 0)
        parts: list[NDArray[Any]] = []
        room, known = self._size, begun
        for tokens, last in self._tokenised(_after(done, self._texts())):
            part, known = tokens[known:], max(0, known - len(tokens))
            while len(part) > room:  # the document does not fit, so this shard is not the last
                begun += room
                yield _Shard(np.concatenate([*parts, part[:room]]), done, begun, last=False)
                part, parts, room = part[room:], [], self._size
            parts.append(part)
            room, begun = room - len(part), begun + len(part)
            if last:
                done, begun, known = done + 1, 0, 0
        if parts:  # empty if `before` was the last shard
            yield _Shard(np.concatenate(parts), done, begun, last=True)

    def _tokenised(self, texts: Iterable[Piece]) -> Iterator[tuple[NDArray[Any], bool]]:
        """Yield the tokens of each piece, with those that start and end a document, and whether it ends there."""
        top = max(*self._tokenizer.get_vocab().values(), *self._start, self._end)
        dtype = np.uint16 if top < 1 << 16 else np.int32
        for group in _groups(texts):
            encoded = self._tokenizer(
                [piece.text for piece in group], add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            for piece, ids in zip(group, encoded["input_ids"], strict=True):
                start, end = self._start if piece.first else [], [self._end] if piece.last else []
                yield np.array([*start, *ids, *end], dtype), piece.last


def _after(documents: int, texts: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the pieces after so many documents."""
    for piece in texts:
        if documents <= 0:
            yield piece
        documents -= piece.last


def _groups(texts: Iterable[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    characters = 0
    for piece in texts:
        group.append(piece)
        characters += len(piece.text) + 1
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokenizer's behaviour. Use the tokenizer once before: that clears its limits on text length."""
    if tokenizer.is_fast:
        whole = tokenizer.backend_tokenizer.to_str()
    else:  # written in Python: its settings and its tokens stand for it
        kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
        added = {id_: repr(token) for id_, token in tokenizer.added_tokens_decoder.items()}
        settings = {
            name: value
            for name, value in tokenizer.init_kwargs.items()
            if isinstance(value, bool | int | float | str) and not _OF_THE_PLACE.search(name)
        }
        whole = json.dumps([kind, settings, tokenizer.get_vocab(), added], sort_keys=True, default=repr)
    return hashlib.sha256(whole.encode()).hexdigest()


def _default_cache() -> Path:
    if own := os.environ.get("FLEXTRON_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flextron"


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write tokenised text to {path}: {error.strerror}. "
            "Free some space, or name another folder for the cache."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _check_paths(paths: list[str]) -> None:
    if not paths:
        raise ValueError("name at least one source of text.")
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"source {path} is named twice; name it once, with the sum of the weights.")
