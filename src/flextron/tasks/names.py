"""Names of tasks and the folder of their data, checked before anything large is loaded: this imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from flextron.errors import FlextronError

PAPER = ("arc_easy", "lambada_openai", "piqa", "winogrande", "mmlu", "hellaswag")
"""The tasks in the tables of the Flextron paper."""
DATA = "FLEXTRON_TASK_DATA"
_MOST_SHOTS = 1000


def data_folder(data: str | Path | None) -> Path | None:
    """The folder of local files: `data`, else `$FLEXTRON_TASK_DATA`, else None for lm-eval's data from the hub.

    Raises:
        FlextronError: the folder does not exist.
    """
    named = data or os.environ.get(DATA)
    if not named:
        return None
    if not Path(named).is_dir():
        raise FlextronError(f"there is no folder {named} with the data of tasks; docs/tasks.md says what it holds.")
    return Path(named)


def task_names(tasks: Sequence[str]) -> list[str]:
    """Replace "paper" by the paper's tasks, and drop repeated names."""
    return list(dict.fromkeys(name for wish in tasks for name in (PAPER if wish == "paper" else (wish,))))


def name_and_shots(wish: str) -> tuple[str, int | None]:
    """Read NAME or NAME@SHOTS.

    Raises:
        FlextronError: it is neither.
    """
    name, at, number = wish.partition("@")
    if not name or (at and not (number.isdecimal() and len(number) < 5 and int(number) <= _MOST_SHOTS)):
        raise FlextronError(
            f"cannot read the task {wish!r}; write NAME or NAME@SHOTS, such as hellaswag@0, with at most "
            f"{_MOST_SHOTS} shots."
        )
    return name, int(number) if at else None


def check_names(tasks: Sequence[str], folder: Path | None) -> None:
    """Pass if there may be tasks of these names; lm-eval itself takes half a minute to say so.

    Raises:
        FlextronError: one is unknown, or lm-eval is not installed.
    """
    names = [name_and_shots(wish)[0] for wish in task_names(tasks)]
    found = find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise FlextronError('tasks need lm-eval. Run: pip install "flextron[tasks]"')
    if folder:
        unknown = [name for name in names if name not in PAPER]
    else:
        places = (Path(found.submodule_search_locations[0]) / "tasks").rglob("*")
        text = b"\n".join(place.read_bytes() for place in places if place.is_file() and place.suffix != ".pyc")
        unknown = [name for name in names if name.encode() not in text]
    if unknown:
        raise no_such_task(unknown[0], folder)


def no_such_task(name: str, folder: Path | None) -> FlextronError:
    """The error for a name that no task has."""
    known = f"in {folder}: {', '.join(PAPER)}" if folder else "of lm-eval; `lm-eval ls tasks` lists them"
    return FlextronError(f"there is no task {name!r} among those {known}.")
