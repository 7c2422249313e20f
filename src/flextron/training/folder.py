"""The folder of a training run: what was asked for, what happened step by step, and at the end the trained model."""

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
from flextron.records import Journal
from flextron.training.snapshot import latest_snapshot

VERSION = 1
SETTINGS_FILE = "train.json"
METRICS_FILE = "metrics.jsonl"
SNAPSHOTS = "checkpoints"
FINAL = ".final"
# What may change between an interrupted run and the one that takes it up, because no weight depends on it.
_FREE = ("out", "watch", "resume", "device", "dry_run")


class RunFolder:
    """OUT of `flextron train`: train.json, metrics.jsonl, checkpoints/, and at the end an elastic checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.snapshots = path / SNAPSHOTS
        self._metrics = Journal(path / METRICS_FILE)

    @property
    def is_finished(self) -> bool:
        """Whether the trained model is there."""
        return (self.path / METADATA_FILE).is_file()

    def check(self, config: TrainConfig, model: str) -> dict[str, Any]:
        """The settings of the run that is taken up here, or nothing where one begins; changes nothing.

        A run that was stopped before its first snapshot has nothing to lose, and gives way.

        Raises:
            CheckpointError: something else is there, or what this run reads, or a run of another model or with other
                settings.
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
        """Take up the run that is here, or begin one, in place of an older one where `resume` says never.

        `arithmetic` is the type that was chosen, for the run that takes this one up.

        Raises:
            CheckpointError: as `check`, or the folder cannot be made.
        """
        if self.check(config, model):
            if self.is_finished:  # killed before it had cleaned up
                self._clear()
            return
        settings = _settings(config, model) | ({"arithmetic": arithmetic} if arithmetic else {})
        try:
            if self._found() and config.resume == "never":
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {self.path}: {error}") from error
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
        """Drop the metrics of steps after `step`: they are taken again."""
        if self._metrics.file.is_file():
            self._metrics.replace(record for record in self.metrics() if record["step"] <= step)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            self._metrics.append(record)
        except OSError as error:
            raise CheckpointError(f"cannot write {self._metrics.file}: {error}.") from error

    def metrics(self) -> list[dict[str, Any]]:
        """All that was logged; lines that a crash cut short are left out."""
        return [record for record in self._metrics.read(strict=False) if type(record.get("step")) is int]

    def finish(self, model: ElasticModel, weights: Any, sensitivity: Sensitivity | None) -> None:
        """Put the trained elastic checkpoint into the folder, flextron.json last; then the snapshots may go.

        `weights` are the trained ones by name, where `model` holds shards only; None takes the model's own.
        """
        whole = self.path / FINAL
        self._clear(snapshots=False)
        found = Checkpoint(model.lm, model.tokenizer, model.search_space, model.ranking)
        checkpoint.save(whole, found, weights=weights)
        if sensitivity is not None:
            sensitivity.save(whole)
        try:
            for file in sorted(whole.iterdir(), key=lambda file: file.name == METADATA_FILE):
                if file.is_dir():
                    shutil.rmtree(self.path / file.name, ignore_errors=True)
                file.replace(self.path / file.name)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error}. The checkpoints are kept.") from error
        os.sync()  # before what could make the model again is deleted
        self._clear()

    def _clear(self, *, snapshots: bool = True) -> None:
        """Delete what an ended or killed run leaves behind."""
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
    """Pass if the run reads nothing that lies in the folder it writes."""
    sources = [Source.parse(source).path for source in config.text.data]
    visit, watch = config.visit, config.watch
    files = (watch.evaluate_text, *watch.evaluate_on, visit.smallest, *visit.presets)
    for path in (config.model, config.optimizer.teacher, *sources, *files):
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder} holds what is to be read: {path}. Name another folder.")


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    old, new = _flat(found), _flat(wanted)
    if old.get("fingerprint") != new["fingerprint"]:
        raise CheckpointError(f"{folder} holds the training of another model. Name another folder.")
    different = [key for key in new if old.get(key) != new[key]]
    if different:
        changes = ", ".join(f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in different[:3])
        raise CheckpointError(
            f"{folder} holds a run with other settings: {changes}. "
            "Ask for the same, name another folder, or pass --resume never to replace that run."
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat
