"""The folder of a training run: its settings, its metrics step by step, and at the end the trained model."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from flextron.atomic import check_apart, clear_errors, keeping, reserved, tell_dropped, write_text
from flextron.config import TrainConfig
from flextron.data.sources import Source
from flextron.elastic import checkpoint
from flextron.elastic.checkpoint import Checkpoint
from flextron.elastic.model import ElasticModel
from flextron.elastic.pack import Pack
from flextron.elastic.smollm2 import named
from flextron.elastic.source import METADATA_FILE, PACK, missing_files
from flextron.errors import CheckpointError
from flextron.locks import INSIDE, check_unlocked
from flextron.ranking.sensitivity import Sensitivity
from flextron.records import Journal, RecordError, checked, parse_object, read_record
from flextron.training.snapshot import latest_snapshot

VERSION = 1
SETTINGS_FILE = "train.json"
METRICS_FILE = "metrics.jsonl"
SNAPSHOTS = "checkpoints"
FINAL = ".final"
GATHERED = ".gathered"
# Settings that may change when a run resumes, because no weight depends on them.
_FREE = ("out", "watch", "resume", "device", "replicate", "dry_run")


class RunFolder:
    """OUT of `flextron train`: train.json, metrics.jsonl, checkpoints/, and at the end an elastic checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.snapshots = path / SNAPSHOTS
        self.gathered = path / GATHERED
        """Where the weights of several processes are put together, until they are in the trained checkpoint."""
        self._metrics = Journal(path / METRICS_FILE)
        self._lock = ExitStack()

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the trained model, whole."""
        return (self.path / METADATA_FILE).is_file() and not missing_files(self.path)

    def check(self, config: TrainConfig, model: str) -> dict[str, Any]:
        """Return the settings of the run to resume, or {} to begin a new one; change nothing on disk.

        A run that was stopped before its first snapshot is not resumed: it has nothing to lose.

        Raises:
            CheckpointError: the folder is not a training run, holds a file that this run reads, or holds a run of
                another model or with other settings.
        """
        _check_outside(self.path, config)
        found = self._found()
        if self.path.is_dir():
            check_unlocked(self.path)
        if not found and self.path.exists() and (not self.path.is_dir() or self._contents()):
            raise CheckpointError(f"{self.path} exists and is not a training run. Name another folder.")
        if config.resume == "never" or not (self.is_finished or latest_snapshot(self.snapshots)):
            return {}
        _check_same(self.path, found, _settings(config, model))
        return found

    def open(self, config: TrainConfig, model: str, *, arithmetic: str | None = None) -> None:
        """Resume the run in this folder, or begin a new one; with `resume` never, a new one replaces an older one.

        No other process can write the folder until `close`. `arithmetic` is the chosen dtype, recorded for the run that
        resumes this one.

        Raises:
            CheckpointError: as `check`, or the folder cannot be created.
        """
        self.check(config, model)
        self._lock.enter_context(reserved(self.path, grows=True))
        try:
            self._begin(config, model, arithmetic)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write the folder."""
        self._lock.close()

    def _begin(self, config: TrainConfig, model: str, arithmetic: str | None) -> None:
        if self.check(config, model):
            if self.is_finished:  # it was killed before it cleaned up
                self._clear()
                self.drop_gathered()
            return
        settings = {**_settings(config, model), **_earlier(config.model)}
        if arithmetic:
            settings["arithmetic"] = arithmetic
        if self._found() and config.resume == "never":
            tell_dropped(self.path, "--resume never")
            with clear_errors(self.path, "Name another folder."):
                for old in self._contents():
                    shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        write_text(self.path / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")

    def _contents(self) -> list[Path]:
        return [path for path in self.path.iterdir() if path.name != INSIDE]

    def _found(self) -> dict[str, Any]:
        file = self.path / SETTINGS_FILE
        if not file.is_file():
            return {}
        try:
            return parse_object(file.read_bytes())
        except (OSError, RecordError) as error:
            raise CheckpointError(f"cannot read {file}: {error}. Name another folder, or remove this one.") from None

    def forget_after(self, step: int) -> None:
        """Delete the metrics of steps after `step`, which will run again."""
        if self._metrics.file.is_file():
            self._metrics.replace(record for record in self.metrics() if record["step"] <= step)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self._metrics.append(record)

    def metrics(self) -> list[dict[str, Any]]:
        """Return all logged records, without lines that a crash cut short, and of a step's doubles the last."""
        try:
            records = self._metrics.read(lambda record: checked(record, _Metrics))
        except OSError as error:
            raise CheckpointError(f"cannot read {self._metrics.file}: {error}.") from None
        return list({(record["step"], "held_out" in record): record for record in records}.values())

    def finish(self, model: ElasticModel, weights: Any, sensitivity: Sensitivity | None) -> None:
        """Write the trained elastic checkpoint into the folder, flextron.json last; then delete the snapshots.

        `weights` are the trained weights by name, needed if `model` holds only shards; None takes the model's own.

        Raises:
            CheckpointError: the disk is full or a write failed; the snapshots are kept.
        """
        final = self.path / FINAL
        self._clear(snapshots=False)
        trained = Checkpoint(model.lm, model.tokenizer, model.search_space, model.ranking)
        with keeping("The last step is kept: run the same command again to write the model."):
            checkpoint.save(final, trained, weights=weights)
            if sensitivity is not None:
                sensitivity.save(final)
        with clear_errors(self.path, "The checkpoints are kept."):
            for file in sorted(final.iterdir(), key=lambda file: file.name == METADATA_FILE):
                if file.is_dir():
                    shutil.rmtree(self.path / file.name, ignore_errors=True)
                file.replace(self.path / file.name)
        os.sync()  # before deleting the snapshots, from which the model could be made again
        self._clear()

    def drop_gathered(self) -> None:
        """Delete the weights that were put together."""
        shutil.rmtree(self.gathered, ignore_errors=True)

    def _clear(self, *, snapshots: bool = True) -> None:
        """Delete leftovers of a finished or killed run."""
        for leftover in (self.path / FINAL, *self.path.glob(f".{FINAL}.partial-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        if snapshots:
            shutil.rmtree(self.snapshots, ignore_errors=True)


class _Step(TypedDict):
    step: int


class _Metrics(_Step, total=False):
    """Those values of a line of metrics.jsonl that are read back; there are others."""

    seconds: float
    held_out: dict[str, float]


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
    check_apart(folder, config.model, config.optimizer.teacher, *sources, *files)


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    old, new = _flat(found), _flat(wanted)
    if old.get("fingerprint") != new["fingerprint"]:
        raise CheckpointError(f"{folder} holds the training of another model. Name another folder.")
    old = {**_flat(_settings(TrainConfig("", folder), "")), **old}  # an option that is newer than the run
    different = [key for key in new if old[key] != new[key]]
    if different:
        changes = "; ".join(f"{key} was {old[key]!r}, now {new[key]!r}" for key in different[:3])
        raise CheckpointError(
            f"{folder} holds a run with other settings: {changes}. "
            "Pass the same settings, name another folder, or pass --resume never to replace that run."
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


class _Text(TypedDict):
    tokens: int
    data: tuple[str, ...]


class _Optimizer(TypedDict):
    learning_rate: float
    text_weight: float
    lora_rank: int


class _Earlier(TypedDict, total=False):
    """Training before this run: of its MODEL."""

    tokens_before: int
    data_before: tuple[str, ...]


class _Trained(_Earlier):
    """Those settings of train.json that are told to people."""

    text: _Text
    optimizer: _Optimizer


def _earlier(model: str) -> _Earlier:
    folder = Path(named(model))
    about = Pack.load(folder).about if (folder / PACK).is_file() else training_of(folder)
    if "tokens" not in about:
        return {}
    return {"tokens_before": about["tokens"], "data_before": tuple(about.get("data", ()))}


def training_of(folder: Path) -> dict[str, Any]:
    """How a checkpoint was trained, for people: {} for one that `train` did not write.

    Tokens and data are those of all runs, one after the other; the settings are those of the last.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return {}
    try:
        settings = checked(read_record(file, version=VERSION), _Trained)
    except (OSError, RecordError) as error:
        raise CheckpointError(f"cannot read {file}: {error}. Delete it to do without.") from None
    text, optimizer = settings["text"], settings["optimizer"]
    data = [Path(Source.parse(source).path).name for source in text["data"]]
    return {
        "tokens": settings.get("tokens_before", 0) + text["tokens"],
        "data": sorted({*settings.get("data_before", ()), *data}),
        "learning_rate": optimizer["learning_rate"],
        "text_weight": optimizer["text_weight"],
        "lora_rank": optimizer["lora_rank"],
    }
