"""The errors of flextron. Catch `FlextronError` for all of them.

FlextronError
├── UnknownFamilyError    flextron does not know this architecture; about ten lines add it
├── CheckpointError       a folder or file is missing, cut off or of another kind
├── SubnetError           the model or its search space does not have these widths (also a ValueError)
├── TooLittleTextError    a text is shorter than one block
├── CostError             a cost table is missing, damaged, or of another device or model
├── BudgetError           a budget cannot be read or met (also a ValueError)
├── RouterError           a router is missing, too inaccurate, or of another checkpoint
├── TrainingError         training cannot go on
└── ExportError           the target format cannot express a sub-network
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 480
"""Characters of a message. Of a longer one the middle is left out, because the way out stands at its end."""


class FlextronError(Exception):
    """Base of all errors that flextron raises. The message is one line, whatever a file or library put into it."""

    def __init__(self, message: str = "") -> None:
        line = " ".join(part.strip() for part in message.splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 163]} … {line[-160:]}")


class UnknownFamilyError(FlextronError):
    """flextron has no `Family` for this architecture. docs/add_a_family.md shows how to add one."""


class CheckpointError(FlextronError):
    """A checkpoint is missing, incomplete or of the wrong kind, or a file cannot be written."""


class SubnetError(FlextronError, ValueError):
    """A `Subnet` does not fit the model or its search space."""


class TooLittleTextError(FlextronError):
    """A text has less than one block of tokens."""


class CostError(FlextronError):
    """A cost table is missing, damaged, or of another device or model."""


class BudgetError(FlextronError, ValueError):
    """A budget cannot be read, or no sub-network meets it."""


class RouterError(FlextronError):
    """A router is missing, too inaccurate, or made for another checkpoint. The same holds for its surrogate."""


class TrainingError(FlextronError):
    """A training run cannot go on, for example because its loss is no longer a number."""


class ExportError(FlextronError):
    """A sub-network cannot be exported to the requested format."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def raised_as(kind: type[FlextronError], doing: str) -> Iterator[None]:
    """Turn what libraries raise for damaged files, errors of many types, into a `kind` that says what failed.

    Args:
        doing: what the block does, such as "cannot load out/elastic".
    """
    try:
        yield
    except FlextronError:
        raise
    except Exception as error:
        raise kind(f"{doing}: {first_line(error)}") from error
