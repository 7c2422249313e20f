"""`flextron quantize`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from flextron.commands import shared
from flextron.config import QuantizeConfig

if TYPE_CHECKING:
    from flextron.model import ElasticModel


def run(config: QuantizeConfig) -> None:
    """Quantise a checkpoint, and write it with what was measured for it."""
    from flextron.atomic import check_apart, check_new, new_folder, reserved
    from flextron.elastic.source import QUANTIZED_FILE

    check_apart(config.out, config.model, config.text)
    with reserved(config.out):
        check_new(config.out, overwrite=config.overwrite)
        model = _compared(config) if config.tokens else shared.load(config)
        with new_folder(config.out, overwrite=config.overwrite) as partial:
            model.save_pretrained(partial, overwrite=True)
            if model.folder is not None:
                _copy_measured(model.folder, partial)
    written = (config.out / QUANTIZED_FILE).stat().st_size
    print(
        f"wrote {config.out}: {written / 1e6:.1f} MB of {config.dtype} weights. Use it as MODEL, such as: "
        f"flextron generate {config.out} PROMPT"
    )


def _compared(config: QuantizeConfig) -> ElasticModel:
    """The quantised model; prints what it loses."""
    from flextron.data.blocks import load_blocks
    from flextron.elastic.quantized import quantize

    model = shared.load(config, dtype="float32")
    blocks = load_blocks(model.tokenizer, config.text, tokens=config.tokens, block_tokens=model.fitting(512))
    before = shared.losses(model, blocks)
    quantize(model, config.dtype)
    after = shared.losses(model, blocks)
    print(shared.loss_table({"float32": before, config.dtype: after}, f"{after[0].tokens} tokens of {config.text}"))
    return model


def _copy_measured(folder: Path, out: Path) -> None:
    """Copy sensitivities, latency tables and routers, which quantised weights keep."""
    from flextron.costs.saved import FOLDER as TABLES
    from flextron.ranking.sensitivity import FILE
    from flextron.routers.static.pairs import FOLDER as ROUTERS

    if (folder / FILE).is_file():
        shutil.copyfile(folder / FILE, out / FILE)
    for name in (TABLES, ROUTERS):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, out / name, ignore=shutil.ignore_patterns(".*"))
