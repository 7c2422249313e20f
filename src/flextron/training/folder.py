"""The folder of a training run: its settings, its metrics step by step, and at the end the trained model."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flextron.atomic import write_text
from flextron.config import TrainConfig
from flextron.data.sources import Source
from flextron.elastic import checkpoint
from flextron.elastic.checkpoint import METADATA_FILE, Checkpoint
from flextron.elastic.model import ElasticModel
from flextron.errors import CheckpointError
from flextron.ranking.sensitivity import Sensitivity
from flextron.records import Journal, read_record
from flextron.training.snapshot import latest_snapshot

VERSION = 1
SETTINGS_FILE = "train.json"
METRICS_FILE = "metrics.jsonl"
SNAPSHOTS = "checkpoints"
FINAL = ".final"
# Settings that may change when a run resumes, because no weight depends on them.
_FREE = ("out", "watch", "resume", "device", "dry_run")


class RunFolder:
    """OUT of `flextron train`: train.json, metrics.jsonl, checkpoints/, and at the end an elastic checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.snapshots = path / SNAPSHOTS
        self._metrics = Journal(path / METRICS_FILE)

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the trained model."""
        return (self.path / METADATA_FILE).is_file()

    def check(self, config: TrainConfig, model: str) -> dict[str, Any]:
        """Return the settings of the run to resume, or {} to begin a new one; change nothing on disk.

        A run that was stopped before its first snapshot is not resumed: it has nothing to lose.

        Raises:
            CheckpointError: the folder is not a training run, holds a file that this run reads, or holds a run of
                another model or with other settings.
        """
        _check_outside(self.path, config)
        found = self._found()
        if not found and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise CheckpointError(f"{self.path} exists and is not a training run. Name another folder.")
        if config.resume == "never" or not (self.is_finished or latest_snapshot(self.snapshots)):
            return {}
        _check_same(self.path, found, _settings(config, model))
        return found

    def open(self, config: TrainConfig, model: str, *, arithmetic: str | None = None) -> None:
        """Resume the run in this folder, or begin a new one; with `resume` never, a new one replaces an older one.

        `arithmetic` is the chosen dtype, recorded for the run that resumes this one.

        Raises:
            CheckpointError: as `check`, or the folder cannot be created.
        """
        if self.check(config, model):
            if self.is_finished:  # it was killed before it cleaned up
                self._clear()
            return
        settings = _settings(config, model) | ({"arithmetic": arithmetic} if arithmetic else {})
        try:
            if self._found() and config.resume == "never":
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create the folder {self.path}: {error}") from error
        write_text(self.path / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")

    def _found(self) -> dict[str, Any]:
        file = self.path / SETTINGS_FILE
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {file}: {error}. Name another folder, or remove this one.") from None
        return found if isinstance(found, dict) else {}

    def forget_after(self, step: int) -> None:
        """Delete the metrics of steps after `step`, which will run again."""
        if self._metrics.file.is_file():
            self._metrics.replace(record for record in self.metrics() if record["step"] <= step)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            self._metrics.append(record)
        except OSError as error:
            raise CheckpointError(f"cannot write {self._metrics.file}: {error}.") from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return all logged records, without lines that a crash cut short."""
        return [record for record in self._metrics.read(strict=False) if type(record.get("step")) is int]

    def finish(self, model: ElasticModel, weights: Any, sensitivity: Sensitivity | None) -> None:
        """Write the trained elastic checkpoint into the folder, flextron.json last; then delete the snapshots.

        `weights` are the trained weights by name, needed if `model` holds only shards; None takes the model's own.

        Raises:
            CheckpointError: the disk is full or a write failed; the snapshots are kept.
        """
        final = self.path / FINAL
        self._clear(snapshots=False)
        trained = Checkpoint(model.lm, model.tokenizer, model.search_space, model.ranking)
        checkpoint.save(final, trained, weights=weights)
        if sensitivity is not None:
            sensitivity.save(final)
        try:
            for file in sorted(final.iterdir(), key=lambda file: file.name == METADATA_FILE):
                if file.is_dir():
                    shutil.rmtree(self.path / file.name, ignore_errors=True)
                file.replace(self.path / file.name)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error}. The checkpoints are kept.") from error
        os.sync()  # before deleting the snapshots, from which the model could be made again
        self._clear()

    def _clear(self, *, snapshots: bool = True) -> None:
        """Delete leftovers of a finished or killed run."""
        for leftover in (self.path / FINAL, *self.path.glob(f".{FINAL}.partial-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        if snapshots:
            shutil.rmtree(self.snapshots, ignore_errors=True)


def _settings(config: TrainConfig, model: str) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    for key in _FREE:
        del plain[key]
    del plain["text"]["cache"]
    return {"version": VERSION, "fingerprint": model, **plain}


def _check_outside(folder: Path, config: TrainConfig) -> None:
    """Check that the run reads no file from the folder that it writes.

    Raises:
        CheckpointError: it reads one.
    """
    sources = [Source.parse(source).path for source in config.text.data]
    visit, watch = config.visit, config.watch
    files = (watch.evaluate_text, *watch.evaluate_on, visit.smallest, *visit.presets)
    for path in (config.model, config.optimizer.teacher, *sources, *files):
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder} holds a file that this run reads: {path}. Name another folder.")


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    old, new = _flat(found), _flat(wanted)
    if old.get("fingerprint") != new["fingerprint"]:
        raise CheckpointError(f"{folder} holds the training of another model. Name another folder.")
    different = [key for key in new if old.get(key) != new[key]]
    if different:
        changes = "; ".join(f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in different[:3])
        raise CheckpointError(
            f"{folder} holds a run with other settings: {changes}. "
            "Pass the same settings, name another folder, or pass --resume never to replace that run."
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


def training_of(folder: Path) -> dict[str, Any]:
    """How a checkpoint was trained, for people: tokens, data and settings; {} for one that `train` did not write."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return {}
    settings = read_record(file, version=VERSION)
    text, optimizer = settings["text"], settings["optimizer"]
    return {
        "tokens": text["tokens"],
        "data": [Path(Source.parse(source).path).name for source in text["data"]],
        **{key: optimizer[key] for key in ("learning_rate", "text_weight", "lora_rank")},
    }
