"""`quickstart`: the whole way on one real LLM, from a checkpoint to sub-networks for any latency and a report."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from flextron.atomic import check_apart, clear_errors, new_folder, reserved, tell_dropped, write_text
from flextron.config import QuickstartConfig
from flextron.demo.packed import PackTour, pack_of
from flextron.demo.stages import in_words
from flextron.demo.tour import Tour
from flextron.elastic.checkpoint import quiet_transformers
from flextron.elastic.smollm2 import smollm2_path
from flextron.errors import FlextronError
from flextron.locks import check_unlocked
from flextron.records import RecordError, parse_object

__all__ = ["quickstart", "smollm2_path"]
VERSION = 4


def quickstart(config: QuickstartConfig | None = None) -> Path:
    """Rank, time, train, route, measure and report; returns the report's path. Stages that are done are not run again.

    Raises:
        FlextronError: the model is not there, or the folder holds a run with other settings.
        KeyboardInterrupt: after Ctrl-C; the folder keeps all stages that are done.
    """
    config = config or QuickstartConfig()
    started = time.monotonic()
    quiet_transformers()
    check_apart(config.out, config.model)
    _prepare(config)
    with reserved(config.out, grows=True):
        try:
            pack = pack_of(config)
            path = (Tour(config, started) if pack is None else PackTour(config, started, pack)).run()
        except KeyboardInterrupt:
            _say_how_to_go_on(config.out)
            raise
    print("\n" + path.read_text(encoding="utf8"))
    print(f"Wrote {path} after {in_words(time.monotonic() - started)}; beside it lie the model and pictures.")
    print(f'Try: flextron generate {config.out / "trained"} "Once upon a time" --budget ttft=0.8x')
    return path


def _say_how_to_go_on(out: Path) -> None:
    print(f"{out} keeps the stages that are done. The same command goes on from there.")
    if (out / "loss.png").is_file():
        print(f"Look at what there is so far: {out / 'report.md'} and {out / 'loss.png'}")


def _prepare(config: QuickstartConfig) -> None:
    """Make the folder, or see that what is in it was made with the same settings."""
    settings_file = config.out / "settings.json"
    settings = {
        "quickstart": VERSION,
        "model": config.model,
        "tokens": config.rank_tokens,
        "thorough": config.thorough,
        "from_scratch": pack_of(config) is None,
        "prompt": config.prompt,
    }
    found = _read_settings(settings_file)
    if config.fresh and found:
        check_unlocked(config.out)
        tell_dropped(config.out, "--fresh")
        with clear_errors(config.out, "Name another folder with --out."):
            shutil.rmtree(config.out)
    elif found:
        if found != settings:
            raise FlextronError(
                f"{config.out} holds a quickstart with other settings ({found}). "
                "Name another folder with --out, or pass --fresh to replace it."
            )
        return
    with new_folder(config.out) as folder:
        write_text(folder / settings_file.name, json.dumps(settings) + "\n")


def _read_settings(file: Path) -> dict[str, Any]:
    """What the run in a folder was asked for; nothing where the folder is not a quickstart's."""
    try:
        settings = parse_object(file.read_bytes())
    except (OSError, RecordError):
        return {}
    return settings if "quickstart" in settings else {}
