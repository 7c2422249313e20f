"""`flextron pack`."""

from __future__ import annotations

from flextron.commands import shared
from flextron.config import PackConfig


def run(config: PackConfig) -> None:
    """Write a pack, and say what it loses against the trained checkpoint."""
    from flextron.atomic import check_apart, check_new, reserved
    from flextron.elastic import pack as packs

    check_apart(config.out, config.trained, config.base, config.text, config.calibration_text)
    with reserved(config.out):
        check_new(config.out, overwrite=config.overwrite, kind=packs.FILE)
        _pack(config)


def _pack(config: PackConfig) -> None:
    from flextron.data.blocks import load_blocks
    from flextron.exporting.card import text_name
    from flextron.exporting.pack import accuracy_table, make_pack, pack_card, save_pack
    from flextron.model import ElasticModel
    from flextron.training.folder import training_of

    accuracy = {} if config.results is None else {"accuracy": accuracy_table(config.results)}
    shared.folder_of(str(config.trained))
    trained = ElasticModel.from_pretrained(config.trained)
    trained.check_float("pack")
    blocks = load_blocks(trained.tokenizer, config.text, tokens=config.tokens, block_tokens=trained.fitting(512))
    inputs = load_blocks(
        trained.tokenizer,
        config.calibration_text,
        tokens=config.calibration_tokens,
        block_tokens=trained.fitting(512),
    )
    before = shared.losses(trained, blocks)
    base = ElasticModel.from_pretrained(config.base, dtype="float32")
    base.folder = trained.folder  # for the sensitivities
    size = int(config.megabytes * 1e6)
    about = training_of(config.trained) | accuracy
    pack = make_pack(trained, base, inputs, base_name=config.base, max_bytes=size, about=about, show=True)
    lost = shared.losses(base, blocks)
    table = shared.loss_table({"trained": before, "pack": lost}, f"{lost[0].tokens} tokens of {text_name(config.text)}")
    save_pack(pack, config.out, trained, pack_card(pack, table), overwrite=config.overwrite)
    print(table)
    written = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    print(
        f"wrote {config.out}, {written / 1e6:.1f} MB. Use it as MODEL, such as: flextron generate {config.out} PROMPT"
    )
