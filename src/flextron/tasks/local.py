"""Local files as data for lm-eval. The YAML files in `yaml/` name these functions. Needs the extra `tasks`."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler

from flextron.errors import FlextronError

EXAMPLES = 10
"""Number of HellaSwag documents that serve as examples and are never scored."""
FILES = {
    "arc_easy": ("arc_easy_test",),
    "lambada_openai": ("lambada_openai_test",),
    "piqa": ("piqa_val",),
    "winogrande": ("winogrande_xl_dev",),
    "mmlu": ("mmlu_dev", "mmlu_test"),
    "hellaswag": ("hellaswag_val",),
}
"""The files of each task, NAME.jsonl or NAME.jsonl.xz."""
_FIELDS: dict[str, dict[str, type]] = {
    "arc_easy": {"question": str, "choices": list, "label": int},
    "lambada_openai": {"text": str},
    "piqa": {"goal": str, "choices": list, "label": int},
    "winogrande": {"context_options": list, "continuation": str, "label": int},
    "mmlu": {"subject": str, "question": str, "choices": list, "label": int},
    "hellaswag": {"activity_label": str, "ctx": str, "endings": list, "label": int},
}


def digest(folder: Path, task: str) -> str:
    """A hash of the files of a task.

    Raises:
        FlextronError: a file is missing.
    """
    return hashlib.sha256(b"".join(_file(folder, name).read_bytes() for name in FILES[task])).hexdigest()[:16]


def arc_easy(data: str, **_: Any) -> dict[str, Dataset]:
    """Splits of ARC-easy."""
    return {"test": _documents(data, "arc_easy", "arc_easy_test")}


def lambada_openai(data: str, **_: Any) -> dict[str, Dataset]:
    """Splits of LAMBADA in OpenAI's version."""
    return {"test": _documents(data, "lambada_openai", "lambada_openai_test")}


def piqa(data: str, **_: Any) -> dict[str, Dataset]:
    """Splits of PIQA."""
    return {"test": _documents(data, "piqa", "piqa_val")}


def winogrande(data: str, **_: Any) -> dict[str, Dataset]:
    """Splits of WinoGrande."""
    return {"test": _documents(data, "winogrande", "winogrande_xl_dev")}


def hellaswag(data: str, **_: Any) -> dict[str, Dataset]:
    """Splits of HellaSwag: ten fixed random documents as examples, and the others as the test."""
    rows = _rows(Path(data), "hellaswag", "hellaswag_val")
    documents = Dataset.from_list([{**row, "ctx": _capitalised(row["ctx"])} for row in rows])
    if len(documents) <= EXAMPLES:
        raise FlextronError(f"hellaswag_val has {len(documents)} documents; {EXAMPLES} are examples, give more.")
    drawn = random.Random(0).sample(range(len(documents)), EXAMPLES)  # noqa: S311 - a fixed draw, no secret
    examples = documents.select(drawn)
    known = {json.dumps(document, sort_keys=True) for document in examples}
    others = [place for place, document in enumerate(documents) if json.dumps(document, sort_keys=True) not in known]
    return {"examples": examples, "test": documents.select(others)}


def _capitalised(context: str) -> str:
    """Capitalise the last sentence of a context, which the endings complete, as lm-eval's prompts do."""
    start = context.rfind(". ") + 2
    if start == 1 or context.endswith((".", "!", "?")):  # one sentence only, or none to finish
        return context
    return context[:start] + context[start : start + 1].upper() + context[start + 1 :]


def mmlu(data: str, **_: Any) -> dict[str, Dataset]:
    """All of MMLU in one split. The column `part` is dev for examples and test for questions."""
    rows = [{**row, "part": part} for part in ("dev", "test") for row in _rows(Path(data), "mmlu", f"mmlu_{part}")]
    return {"all": Dataset.from_list(rows)}


def questions(documents: Dataset) -> Dataset:
    """The part of MMLU to score."""
    return _part(documents, "test")


def examples(documents: Dataset) -> Dataset:
    """The part of MMLU to show as examples before questions."""
    return _part(documents, "dev")


class SameSubject(ContextSampler):  # type: ignore[misc]
    """Use examples of the question's own subject, in the order of the file."""

    def sample(self, n: int, eval_doc: dict[str, Any] | None = None, df: Any = None, **_: Any) -> Sequence[Any]:
        """The first `n` examples of the subject of `eval_doc`.

        Raises:
            FlextronError: the subject has fewer.
        """
        subject = (eval_doc or {}).get("subject")
        found = [document for document in (df or self.df) if document["subject"] == subject][:n]
        if len(found) < n:
            raise FlextronError(f"mmlu_dev has {len(found)} examples of {subject}; {n} were asked for (mmlu@{n}).")
        return found


def _part(documents: Dataset, part: str) -> Dataset:
    return documents.select([place for place, own in enumerate(documents["part"]) if own == part])


def _documents(data: str, task: str, name: str) -> Dataset:
    return Dataset.from_list(list(_rows(Path(data), task, name)))


def _rows(folder: Path, task: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield the fields of a task's documents, checked.

    Raises:
        FlextronError: a file is missing or damaged, or a row has another schema.
    """
    file = _file(folder, name)
    fields = _FIELDS[task]
    for number, line in enumerate(_lines(file), start=1):
        try:
            row = json.loads(line)
            document = {field: row[field] for field in fields}
        except (ValueError, KeyError, TypeError) as error:
            raise FlextronError(f"{file}, line {number}: {task} needs {', '.join(fields)} ({error!r}).") from None
        wrong = [field for field, kind in fields.items() if not isinstance(document[field], kind)]
        options = next((document[field] for field, kind in fields.items() if kind is list), None)
        if not wrong and options is not None and not 0 <= document["label"] < len(options):
            wrong = ["label"]
        if wrong:
            raise FlextronError(f"{file}, line {number}: {wrong[0]} is {document[wrong[0]]!r}, not of {task}'s schema.")
        yield document


def _lines(file: Path) -> list[str]:
    try:
        with lzma.open(file, "rt", encoding="utf8") if file.suffix == ".xz" else file.open(encoding="utf8") as lines:
            return [line for line in lines if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise FlextronError(f"cannot read {file}: {error}.") from None


def _file(folder: Path, name: str) -> Path:
    for file in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.xz"):
        if file.is_file():
            return file
    raise FlextronError(f"{folder} has no {name}.jsonl or {name}.jsonl.xz; docs/tasks.md says what belongs in it.")
