"""Make a pack: the low-rank difference between a trained elastic model and its base.

A change D of a weight is replaced by B A, the best of its rank for the inputs that the weight sees: with
E[a a^T] = C C^T, the truncated SVD of D C (as SVD-LLM does it, Wang et al., ICLR 2025, arXiv 2403.07378, section 3.1).
All parts of all weights compete for the bytes: first come those that explain most of their projection's output.

Shapes: R rank, D [out, in], C [in, in], N tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flextron.atomic import new_folder
from flextron.data.blocks import TokenBlocks
from flextron.elastic import pack as packs
from flextron.elastic.layers import ElasticLayer, SubLayer
from flextron.elastic.model import ElasticModel, projections_of
from flextron.elastic.pack import LowRank, Pack
from flextron.elastic.permutation import permute
from flextron.elastic.projections import Projection
from flextron.environment import dtype_name
from flextron.errors import ExportError
from flextron.exporting.card import CARD, text_name, text_names
from flextron.ranking.moments import root_of, second_moments
from flextron.ranking.sensitivity import Sensitivity
from flextron.records import Journal
from flextron.routers.static.pairs import FOLDER, Pairs

MOST_RANK = 128
"""Largest rank of a change."""


class _Parts(NamedTuple):
    """The parts of one change, largest first: b[:, :R] @ a[:R] is the best change of rank R."""

    a: torch.Tensor
    b: torch.Tensor
    worth: torch.Tensor
    """Of each part: mean square of the output that it explains, as a share of the projection's output."""
    bytes: int
    """Of one part."""


def make_pack(
    trained: ElasticModel,
    base: ElasticModel,
    blocks: TokenBlocks,
    *,
    base_name: str,
    max_bytes: int = 12_000_000,
    about: Mapping[str, Any] | None = None,
    show: bool = False,
) -> Pack:
    """Return the pack of at most `max_bytes` that turns `base` into `trained`, nearly; `base` becomes that model.

    Args:
        trained: the trained model, on the CPU, in any type.
        base: the checkpoint that it was ranked from, in float32 and not ranked.
        blocks: text on which the weights' inputs are measured.
        base_name: where users find the base: a hub id, a path, or smollm2.

    Raises:
        ExportError: `trained` has no ranking, is another architecture, or differs from the base in more than fits.
    """
    if trained.ranking is None:
        raise ExportError("this checkpoint has no ranking, so there is nothing to pack. Rank or train it first.")
    if base.ranking is not None or base.config.model_type != trained.config.model_type:
        raise ExportError(f"{base_name} is not what the checkpoint was ranked from. Name its base, as `rank` read it.")
    base_fingerprint = base.fingerprint()
    permute(base, trained.ranking)
    others = _others(trained, base)
    room = max_bytes - sum(tensor.nbytes for tensor in others.values()) - 8 * trained.ranking.neurons.numel()
    parts = dict(_changes(trained, base, blocks, show=show))
    pack = Pack(
        base=base_name,
        base_fingerprint=base_fingerprint,
        fingerprint="",
        dtype=dtype_name(trained.dtype),
        search_space=trained.search_space,
        ranking=replace(trained.ranking, text=text_name(trained.ranking.text)),
        changes=_within(parts, room),
        others=others,
        about=about or {},
    )
    pack.change(base)
    return pack.made(base.fingerprint())


def save_pack(pack: Pack, folder: Path, trained: ElasticModel, card: str, *, overwrite: bool = False) -> None:
    """Write a pack's folder: the pack, what lies beside the trained checkpoint and belongs to it, and a model card.

    Routers of the trained weights are kept for the pack's, which are nearly the same.

    Raises:
        CheckpointError: the folder exists and `overwrite` is false, or it cannot be written.
    """
    with new_folder(folder, overwrite=overwrite, kind=packs.FILE) as partial:
        pack.save(partial)
        if trained.folder is not None and Sensitivity.is_in(trained.folder):
            sensitivity = Sensitivity.load(trained.folder)
            replace(sensitivity, text=text_name(sensitivity.text)).save(partial)
        if trained.folder is not None and (trained.folder / FOLDER).is_dir():
            shutil.copytree(trained.folder / FOLDER, partial / FOLDER, ignore=shutil.ignore_patterns("slopes-*", ".*"))
        _hand_over(partial, trained.fingerprint(), pack.fingerprint)
        (partial / CARD).write_text(card, encoding="utf8")


def accuracy_table(results: Path) -> str:
    """Accuracy over chance by sub-network as a Markdown table, from a results.json of `flextron evaluate --tasks`.

    Raises:
        ExportError: the file cannot be read.
    """
    try:
        summary = json.loads(results.read_text(encoding="utf8"))
        rows = [(row["run"], row["headline"], row["all"]) for row in summary["runs"]]
        lines = [
            f"| {run} | {100 * headline['over_chance']:.1f} ± {100 * headline['standard_error']:.1f} "
            f"| {100 * headline['kept']:.1f}% ± {100 * headline['kept_standard_error']:.1f} "
            f"| {100 * headline['flips']:.1f}% | {100 * everything['over_chance']:.1f} |"
            for run, headline, everything in rows
        ]
        tasks, limit = rows[0][1]["tasks"], summary["conditions"]["limit"]
        others = [task for task in rows[0][2]["tasks"] if task not in tasks]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ExportError(
            f"cannot read {results} ({error!r}). Name a results.json of `flextron evaluate --tasks`."
        ) from None
    last = f"with {', '.join(others)}" if others else "of all tasks"
    head = [f"| sub-network | over chance, points | kept | flips | {last} |", "|---|---:|---:|---:|---:|"]
    documents = "all" if limit is None else f"at most {limit}"
    about = f"Mean of {', '.join(tasks)}; {documents} documents a task, ± standard error."
    return "\n".join([*head, *lines, "", about])


def _hand_over(folder: Path, old: str, new: str) -> None:
    """Let the routers and pairs of one fingerprint belong to another one."""
    for file in folder.glob("routers/*/*.json"):
        record = json.loads(file.read_text(encoding="utf8"))
        if record.get("fingerprint") == old:
            file.write_text(json.dumps({**record, "fingerprint": new}) + "\n", encoding="utf8")
    for file in folder.glob("routers/pairs-*.jsonl"):
        header, *pairs = Journal(file).read()
        file.unlink()
        if header.get("fingerprint") == old:
            about = {key: value for key, value in header.items() if key != "version"}
            Journal(Pairs.beside(folder, {**about, "fingerprint": new}).file).replace(
                [{**header, "fingerprint": new}, *pairs]
            )


def pack_card(pack: Pack, losses: str) -> str:
    """Return the text of README.md.

    Args:
        losses: a Markdown table of what the pack loses against the trained checkpoint.
    """
    trained = pack.about.get("tokens")
    history = f"trained on {trained:,} tokens of {text_names(pack.about['data'])}" if trained else "not trained further"
    sections = [
        "---\nlibrary_name: flextron\npipeline_tag: text-generation\ntags: [flextron]\n---",
        f"# An elastic pack for {pack.base}",
        f"One file beside the base checkpoint makes a model whose first units come first: ranked by "
        f"{pack.ranking.score} on {pack.ranking.tokens:,} tokens of {pack.ranking.text}, {history}.",
        f'```python\nfrom flextron import ElasticModel\n\nmodel = ElasticModel.from_pretrained("{pack.base}", '
        'pack="THIS FOLDER")\n```',
        "## What the pack loses",
        losses,
        *(["## Accuracy over chance", pack.about["accuracy"]] if "accuracy" in pack.about else []),
    ]
    return "\n\n".join(sections) + "\n"


def _others(trained: ElasticModel, base: ElasticModel) -> dict[str, torch.Tensor]:
    """The parameters outside the projections that training has changed: norms and biases, as a rule."""
    projections = {id(projection.weight) for projection in projections_of(trained).values()}
    own = dict(base.lm.named_parameters())
    changed = {}
    for name, parameter in trained.lm.named_parameters():
        if id(parameter) in projections:
            continue
        if name not in own or own[name].shape != parameter.shape:
            raise ExportError(f"the base has no {name} of this size, so it is another model. Name the right base.")
        if not torch.equal(own[name].to(parameter.dtype), parameter):
            changed[name] = parameter.detach().float()
    return changed


def _narrowing(layer: ElasticLayer) -> list[SubLayer]:
    """The sub-layers of a layer that narrow; the others are not trained."""
    return [sub for sub in layer.subs.values() if sub.opens]


def _changes(
    trained: ElasticModel, base: ElasticModel, blocks: TokenBlocks, *, show: bool
) -> Iterator[tuple[str, _Parts]]:
    before, after = projections_of(base), projections_of(trained)
    names = {id(projection): name for name, projection in after.items()}

    def read(layer: ElasticLayer) -> list[Projection]:
        """One projection for each input: those that open a sub-layer read the same."""
        return [projection for sub in _narrowing(layer) for projection in (sub.opens[0], sub.closes)]

    found = second_moments(trained, read, blocks, title="pack" if show else None)
    with torch.no_grad(), closing(found):
        for layer, moments in zip(trained.layers, found, strict=True):
            for sub, opened, closed in zip(_narrowing(layer), moments[::2], moments[1::2], strict=True):
                for projection in (*sub.opens, sub.closes):
                    name, weight = names[id(projection)], projection.matrix().float()
                    change = weight - before[name].matrix().float()
                    if change.any():
                        yield name, _parts(change, weight, closed if projection is sub.closes else opened)


def _parts(change: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor) -> _Parts:
    root = root_of(moment)
    torch.manual_seed(0)  # svd_lowrank is randomised
    u, sizes, v = torch.svd_lowrank(change @ root, q=min(MOST_RANK, *change.shape), niter=2)
    a = torch.linalg.solve_triangular(root, v.T * sizes.sqrt()[:, None], upper=False, left=False)
    worth = sizes.square() / (weight @ root).square().sum()
    return _Parts(a, u * sizes.sqrt(), worth, sum(change.shape) + 4)


def _within(parts: Mapping[str, _Parts], room: int) -> dict[str, LowRank]:
    """The parts worth most per byte that fit into `room` bytes."""
    ordered = sorted(
        (
            (float(worth) / each.bytes, name, rank)
            for name, each in parts.items()
            for rank, worth in enumerate(each.worth)
        ),
        reverse=True,
    )
    ranks = dict.fromkeys(parts, 0)
    for _, name, _ in ordered:
        room -= parts[name].bytes
        if room < 0:
            break
        ranks[name] += 1
    return {name: LowRank.of(parts[name].a[:rank], parts[name].b[:, :rank]) for name, rank in ranks.items() if rank}
