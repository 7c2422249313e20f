"""Tokens of transformers' own `generate` as an iterator: it runs in a thread, which waits until the next is asked for.

The thread and its reader take turns and never run at the same time. What the reader does between two tokens, with the
model or with random numbers, is what it would do without a thread. The thread may use the model where its reader may.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from flextron.elastic.holding import acted_for, acting_for


class _Turns(BaseStreamer):  # type: ignore[misc]
    """What `generate` gives its tokens to, in its thread; it returns to `generate` when the reader wants more."""

    def __init__(self) -> None:
        self.given: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        """Tokens, or what ended `generate`: None, or an error."""
        self._asked = Semaphore(0)
        self._closed = False
        self._has_prompt = False
        self.reader = acted_for()
        """The thread that asked last."""

    def put(self, value: torch.Tensor) -> None:
        """Hand over tokens, except the first ones, which are the prompt, and wait for the reader."""
        if not self._has_prompt:
            self._has_prompt = True
        elif not self._closed:
            self.given.put(value.flatten().tolist())
            self._asked.acquire()

    def end(self) -> None:
        """Nothing: the thread says itself that it is done, or what went wrong."""

    def ask(self) -> None:
        """Let `generate` go on."""
        self.reader = acted_for()
        self._asked.release()

    def close(self) -> None:
        """Let `generate` stop after the forward pass that it is in."""
        self._closed = True
        self.ask()

    def is_closed(self, tokens_BT: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """A stopping criterion: whether to stop, for each row."""
        return tokens_BT.new_full(tokens_BT.shape[:1], self._closed, dtype=torch.bool)


def generated_tokens(
    generate: Callable[..., Any],
    prompt_BT: torch.Tensor,
    *,
    in_one: bool = False,
    stopping_criteria: StoppingCriteriaList | None = None,
    **options: Any,
) -> Generator[int, None, None]:
    """The tokens that `generate` of a transformers model writes after the prompt [1, T], each as it comes.

    An error in `generate` is raised here. Closing the iterator ends the thread.

    Args:
        in_one: all tokens when the last one is there, as beam search has to.
        options: of `generate`.
    """
    turns = _Turns()
    criteria = StoppingCriteriaList([*(stopping_criteria or ()), turns.is_closed])
    options |= {"streamer": None if in_one else turns, "stopping_criteria": criteria}
    arithmetic = _autocast(prompt_BT.device.type)

    def work() -> None:
        try:
            with torch.inference_mode(), arithmetic, acting_for(lambda: turns.reader):
                output_BT = generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **options)
            if in_one:
                turns.given.put(output_BT[0, prompt_BT.shape[1] :].tolist())
            turns.given.put(None)
        except BaseException as error:
            turns.given.put(error)

    thread = Thread(target=work, name="flextron generate", daemon=True)  # which must not keep a finished program alive
    thread.start()
    try:
        while (given := turns.given.get()) is not None:
            if isinstance(given, BaseException):
                raise given
            yield from given
            turns.ask()
    finally:
        turns.close()
        thread.join()


def _autocast(device_type: str) -> torch.autocast:
    """The reader's autocast, which a new thread would not have."""
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, dtype=dtype, enabled=enabled)
