"""`ElasticModel`: runs a transformers model as any of its nested sub-networks, by swapping its projections in place.

Flextron (Cai et al., ICML 2024, arXiv 2406.10260), section 3: a sub-network keeps the first d_j neurons or heads of
ranked weights. Ours: KV groups with their query heads instead of heads, and width 0 for depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flextron.elastic import checkpoint
from flextron.elastic.checkpoint import Checkpoint, Ranking
from flextron.elastic.families import Family, family_of
from flextron.elastic.holding import Holder
from flextron.elastic.layers import SubLayer, make_layers_elastic
from flextron.elastic.projections import Projection
from flextron.environment import default_device, dtype_name
from flextron.errors import CheckpointError, FlextronError
from flextron.subnet import SearchSpace, Subnet

if TYPE_CHECKING:
    from typing import Self


class ElasticModel:
    """A decoder LLM that runs as any of its nested sub-networks; `flextron.ElasticModel` adds budgets.

    `lm` is the transformers model itself, with its projections swapped in place. Its Parameters keep their names, so
    anything that takes a transformers model takes `lm`. Choosing a sub-network copies nothing.

        model = ElasticModel.from_pretrained("out/smollm2-elastic")
        with model.use(subnet):
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
            family: where the architecture keeps what narrows; by default its entry in FAMILIES.

        Raises:
            UnknownFamilyError: the architecture has no spec.
            ValueError: the search space or the ranking belongs to another model, or the spec is wrong.
        """
        self.lm = lm
        self.tokenizer = tokenizer
        self.folder: Path | None = None
        """Folder that the model was loaded from, which may hold latency tables and routers; None for other sources."""
        self.ranking = ranking
        self.family: Family = family or family_of(lm.config.model_type)
        self.layers = make_layers_elastic(lm, self.family)
        first = self.layers[0]
        sizes = {"layers": len(self.layers), **{axis: sub.width.full for axis, sub in first.subs.items()}}
        if ranking is not None:
            ranking.check(**sizes, query_heads=first.attention.heads_per_unit)
        self.search_space = search_space or SearchSpace.of_model(**sizes, least_neurons=self.least_units)
        _check_fits(self.search_space, sizes)
        self._subnet = self.search_space.full
        self._quantization: str | None = None
        self._fingerprint: str | None = None
        self.holder = Holder()
        lm.register_forward_pre_hook(self.holder.check)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        search_space: SearchSpace | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a plain or elastic checkpoint: a folder, a hub id, or a GGUF file (dequantised to `dtype`).

        Only safetensors and GGUF weights are read. No remote code runs unless `trust_remote_code=True` is passed.

        Args:
            device: where to put the model; "auto" takes a GPU if there is one.
            kwargs: passed to transformers' `from_pretrained` (`revision`, `attn_implementation`, ...).

        Raises:
            CheckpointError: the checkpoint is missing, truncated or incomplete.
            UnknownFamilyError: the architecture has no spec.
            FlextronError: the device does not exist.
        """
        loaded = checkpoint.load(path, dtype=dtype, **kwargs)
        move(loaded.lm, device)
        try:
            model = cls(
                loaded.lm, loaded.tokenizer, search_space=search_space or loaded.search_space, ranking=loaded.ranking
            )
        except (TypeError, ValueError) as error:
            if search_space is not None:
                raise
            raise CheckpointError(f"cannot make {path} elastic: {error}") from error
        model.folder = Path(path) if Path(path).is_dir() else None
        return model

    def save_pretrained(
        self, folder: str | Path, *, overwrite: bool = False, beside: Mapping[str, str] | None = None
    ) -> None:
        """Write a folder that transformers loads as the full model, and `from_pretrained` as this elastic model.

        `beside` are further text files by name, written with it.

        Raises:
            CheckpointError: the folder exists and `overwrite` is false, or it cannot be written (then nothing is left);
                or the weights are quantised.
        """
        self.check_float("save")
        saved = Checkpoint(self.lm, self.tokenizer, self.search_space, self.ranking)
        checkpoint.save(folder, saved, overwrite=overwrite, beside=beside)

    @property
    def subnet(self) -> Subnet:
        """Sub-network in use."""
        return self._subnet

    @contextmanager
    def use(self, subnet: Subnet) -> Iterator[ElasticModel]:
        """Run as `subnet` inside the block, then as before. Nothing is copied: weights are shared views.

        Tokens that were routed are not inside the block: all of them run as `subnet`. In training, call `backward`
        inside the block too: gradient checkpointing runs the forward pass again there.

        Raises:
            SubnetError: `subnet` is not in the search space of this model.
            FlextronError: another thread is inside such a block, or runs the model.
        """
        self.search_space.check(subnet)
        with self.holder.held():
            before = self._subnet
            routed = [(sub.width, sub.width.run) for _, _, sub in self.sub_layers() if sub.width.run is not None]
            try:  # Ctrl-C may come while widths are set
                for width, _ in routed:
                    width.run = None
                self._choose(subnet)
                yield self
            finally:
                self._choose(before)
                for width, run in routed:
                    width.run = run

    @property
    def least_units(self) -> int:
        """Units of an MLP that are kept at least, if any: as many experts as a token is routed to."""
        if not self.family.mlp.holds_experts:
            return 1
        names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
        return next((int(value) for name in names if (value := getattr(self.config, name, None))), 1)

    def _choose(self, subnet: Subnet) -> None:
        for layer, axis, sub in self.sub_layers():
            sub.keep(subnet[axis][layer])
        self._subnet = subnet

    def sub_layers(self) -> Iterator[tuple[int, str, SubLayer]]:
        """Yield layer index, axis and sub-layer for every elastic sub-layer."""
        for index, layer in enumerate(self.layers):
            for axis, sub in layer.subs.items():
                yield index, axis, sub

    @property
    def unit_weights(self) -> dict[str, tuple[int, ...]]:
        """Number of weights in one unit, for each axis and layer."""
        return {axis: tuple(layer[axis].weights_per_unit for layer in self.layers) for axis in self.family.axes}

    def layer_weights(self, subnet: Subnet) -> int:
        """Count the weights that `subnet` keeps, without embeddings, norms and closing biases."""
        return sum(subnet[axis][layer] * sub.weights_per_unit for layer, axis, sub in self.sub_layers())

    def fingerprint(self, whole: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight) -> str:
        """Return a hash of the sizes and of the weights' signs, which is the same in every dtype.

        Args:
            whole: gets a weight that is not here, as in a model without weights; the hash is then kept.
        """
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256(repr((self.config.model_type, self.search_space)).encode())
        for layer in (self.layers[0], self.layers[-1]):
            for sub in layer.subs.values():
                weight = next(iter(sub.unit_parameters())) if sub.axis.experts else sub.closes.weight
                digest.update(whole(weight).detach().signbit().cpu().numpy().tobytes())
        found = digest.hexdigest()[:16]
        if self.is_empty:
            self._fingerprint = found
        return found

    def fingerprint_is(self, fingerprint: str) -> None:
        """Note the fingerprint of weights that are not here."""
        self._fingerprint = fingerprint

    @property
    def is_empty(self) -> bool:
        """Whether this is a model without weights (`elastic.skeleton`), before a training run fills it."""
        return bool(next(self.lm.parameters()).is_meta)

    def share(self, subnet: Subnet) -> float:
        """Return the share of the layers' weights that `subnet` keeps, 0 to 1."""
        return self.layer_weights(subnet) / self.layer_weights(self.search_space.full)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass of the transformers model with the sub-network in use."""
        with self.holder.running():
            return self.lm(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call transformers' `generate` with the sub-network in use; the KV cache holds only its KV groups."""
        with self.holder.running():
            return self.lm.generate(*args, **kwargs)

    @property
    def weights_type(self) -> str:
        """Type of the weights, such as "float32" or "int8"."""
        return self._quantization or dtype_name(self.dtype)

    def check_float(self, verb: str) -> None:
        """Pass if the weights are in float.

        Args:
            verb: what is to be done with them, such as "save".

        Raises:
            CheckpointError: they are quantised.
        """
        if self._quantization is not None:
            raise CheckpointError(
                f"cannot {verb} {self._quantization} weights: they are for running only. Take the model that they were "
                "made from, in a float type."
            )

    def quantized_to(self, name: str, fingerprint: str) -> None:
        """Note that the weights are of another type now; what was measured for them before still belongs to them."""
        self._quantization = name
        self.fingerprint_is(fingerprint)

    @property
    def positions(self) -> int | None:
        """Tokens that a text may have at most: rows of the table of learned positions; None where there is no table."""
        if not self.family.positions:
            return None
        table: Any = self.lm.get_submodule(self.family.positions)  # OPT's has two rows more
        return min(int(table.num_embeddings), int(self.config.max_position_embeddings))

    def fitting(self, tokens: int) -> int:
        """Block of `tokens` tokens, or as many as the model has positions for."""
        return tokens if self.positions is None else min(tokens, self.positions)

    def check_length(self, tokens: int, way_out: str) -> None:
        """Pass if a text of so many tokens fits the model.

        Args:
            way_out: what to do where it does not, such as "Pass --block-tokens 256.".

        Raises:
            ValueError: the table of learned positions is shorter.
        """
        if self.positions is not None and tokens > self.positions:
            raise ValueError(f"{tokens} tokens are more than the {self.positions} positions of this model. {way_out}")

    def check_tokens(self, tokens: torch.Tensor) -> None:
        """Pass if the model has an embedding for each of these tokens.

        Raises:
            CheckpointError: it has not, because its tokenizer is damaged or another model's.
        """
        rows = self.lm.get_input_embeddings().weight.shape[0]
        if tokens.numel() and int(tokens.max()) >= rows:
            raise CheckpointError(
                f"the tokenizer gives token {int(tokens.max())}, but the model has {rows} tokens: the tokenizer is "
                "damaged or belongs to another model. Put the model's own tokenizer files into its folder."
            )

    @property
    def config(self) -> Any:
        """Config of the full model."""
        return self.lm.config

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return torch.device(self.lm.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        dtype: torch.dtype = self.lm.dtype
        return dtype


def projections_of(model: ElasticModel) -> dict[str, Projection]:
    """Every elastic projection, by its name in the transformers model."""
    found: dict[str, Projection] = {}
    for index, _, sub in model.sub_layers():
        if sub.axis.experts:
            continue
        paths = zip((*sub.axis.opens, sub.axis.closes), (*sub.opens, sub.closes), strict=True)
        found |= {f"{model.family.layers}.{index}.{path}": projection for path, projection in paths}
    return found


def cast(lm: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Turn the weights into `dtype`. Buffers keep theirs, as in transformers: rotary tables need float32."""
    for weight in lm.parameters():
        weight.data = weight.data.to(dtype)
    return lm


def move(lm: PreTrainedModel, device: str | torch.device) -> None:
    """Move a model; "auto" takes a GPU if there is one.

    Raises:
        FlextronError: the device does not exist.
    """
    if device == "auto":
        device = default_device()
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no numbers")
        if torch.device(device) != lm.device:
            lm.to(device)
    except (RuntimeError, AssertionError) as error:
        raise FlextronError(f"cannot run on device {str(device)!r}: {str(error).splitlines()[0]}") from None


def _check_fits(space: SearchSpace, sizes: dict[str, int]) -> None:
    if space.sizes != sizes:
        raise ValueError(f"this search space is for a model with {space.sizes}; this one has {sizes}.")
