"""Where each architecture keeps its layers and elastic axes: one `Family` of about ten lines. No torch here.

To add a family, see docs/add_a_family.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flextron.errors import UnknownFamilyError


@dataclass(frozen=True)
class Axis:
    """One elastic axis: the units of one sub-layer, which are neurons, or KV groups with their query heads.

    An axis without `opens` does not narrow: the whole sub-layer is its only unit, which is kept or left out.
    """

    opens: tuple[str, ...]
    """Projections whose output rows belong to the units, as paths inside a layer."""
    closes: str
    """The projection whose input columns belong to the units. Its parent module is the sub-layer; if that is the layer,
    the projections alone are."""
    config_keys: tuple[str, ...] = ()
    """Config fields that shrink with the axis. The first one counts the units. Empty if no config can state them."""
    stacked: int = 1
    """Number of projections stacked in each opening weight: 3 if Q, K and V are blocks of one matrix."""
    norm: str = ""
    """Path inside a layer of the norm that only this sub-layer reads. It is skipped with the sub-layer. Or empty."""
    counts: tuple[str, ...] = ()
    """Attributes in which the model's own code counts heads or rows, as paths inside a layer. They shrink alike."""
    outputs: int = 1
    """Number of values that the sub-layer returns: the output alone, or a tuple of (output, weights, ...)."""
    experts: bool = False
    """Whether `closes` is the experts of a mixture, which are the units: tensors whose first dimension counts them."""
    instead: Axis | None = None
    """What stands in its place in layers without `closes`, such as the linear attentions of a hybrid."""

    @property
    def module(self) -> str:
        """Path of the sub-layer inside its layer; empty if it has no module of its own."""
        return self.closes.rpartition(".")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of the modules that make up the sub-layer."""
        return (self.module,) if self.module else (*self.opens, self.closes)

    @property
    def narrows(self) -> bool:
        """Whether single units can be left out; else only the whole sub-layer can."""
        return self.experts or bool(self.opens)

    @property
    def holds_experts(self) -> bool:
        """Whether some layers have experts; then other layers have as many units, blocks of neurons."""
        return any(kind.experts for kind in self.kinds())

    def kinds(self) -> Iterator[Axis]:
        """Yield this axis and those that stand in its place in other layers."""
        axis: Axis | None = self
        while axis is not None:
            yield axis
            axis = axis.instead


@dataclass(frozen=True)
class Family:
    """Where a `model_type` of transformers keeps its layers, and the two elastic axes of a layer."""

    layers: str
    """Path of the list of layers inside the model for causal language modelling."""
    mlp: Axis
    attention: Axis
    positions: str = ""
    """Path of the table of learned positions inside the model; empty where positions are computed (rotary)."""
    exports_fewer_heads: bool = True
    """Whether its config can state a head size other than hidden size / heads."""

    @property
    def axes(self) -> dict[str, Axis]:
        """What narrows in each layer, by its name in a `Subnet`."""
        return {"neurons": self.mlp, "kv_groups": self.attention}


_GATED_MLP = Axis(
    opens=("mlp.gate_proj", "mlp.up_proj"),
    closes="mlp.down_proj",
    config_keys=("intermediate_size",),
    norm="post_attention_layernorm",
)
_GROUPED_ATTENTION = Axis(
    opens=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    closes="self_attn.o_proj",
    config_keys=("num_key_value_heads", "num_attention_heads"),
    norm="input_layernorm",
    outputs=2,
)
LLAMA_LIKE = Family(layers="model.layers", mlp=_GATED_MLP, attention=_GROUPED_ATTENTION)
GEMMA = replace(LLAMA_LIKE, mlp=replace(_GATED_MLP, norm="pre_feedforward_layernorm"))

GPT2 = Family(
    layers="transformer.h",
    positions="transformer.wpe",
    mlp=Axis(opens=("mlp.c_fc",), closes="mlp.c_proj", config_keys=("n_inner",), norm="ln_2"),
    attention=Axis(
        opens=("attn.c_attn",),
        closes="attn.c_proj",
        config_keys=("num_attention_heads",),
        stacked=3,
        norm="ln_1",
        counts=("attn.split_size",),
        outputs=2,
    ),
    exports_fewer_heads=False,
)

GPT_NEOX = Family(
    layers="gpt_neox.layers",
    mlp=Axis(
        opens=("mlp.dense_h_to_4h",),
        closes="mlp.dense_4h_to_h",
        config_keys=("intermediate_size",),
        norm="post_attention_layernorm",
    ),
    attention=Axis(
        opens=("attention.query_key_value",),  # Q, K, V of each head lie together, so a prefix of rows is whole heads
        closes="attention.dense",
        config_keys=("num_attention_heads",),
        norm="input_layernorm",
        outputs=2,
    ),
    exports_fewer_heads=False,
)

PHI = Family(  # both sub-layers read the same norm
    layers="model.layers",
    mlp=Axis(opens=("mlp.fc1",), closes="mlp.fc2", config_keys=("intermediate_size",)),
    attention=Axis(
        opens=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        closes="self_attn.dense",
        config_keys=("num_key_value_heads", "num_attention_heads"),
        outputs=2,
    ),
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "smollm3": LLAMA_LIKE,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "granite": LLAMA_LIKE,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "phi": PHI,
}


def family_of(model_type: str) -> Family:
    """The spec of a transformers `model_type`.

    Raises:
        UnknownFamilyError: there is no spec. The message says what to add and where.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        if model_type.startswith("flextron_"):
            raise UnknownFamilyError(
                "this checkpoint is an exported sub-network, whose layers differ; it cannot be narrowed again. "
                "Load it with AutoModelForCausalLM, or use the elastic checkpoint that it came from."
            ) from None
        raise UnknownFamilyError(
            f"no family spec for the architecture {model_type!r}; known: {', '.join(sorted(FAMILIES))}. "
            f"To add it, write a Family of about ten lines and the entry FAMILIES[{model_type!r}] in "
            "src/flextron/elastic/families.py; docs/add_a_family.md shows how, and which tests check it."
        ) from None


def cannot_narrow(kind: str, reason: str) -> UnknownFamilyError:
    """The error for an architecture of which discovery finds too little that narrows."""
    return UnknownFamilyError(
        f"cannot narrow the architecture {kind!r}: {reason}. If you know where its layers keep what narrows, write an "
        f"entry FAMILIES[{kind!r}] of about ten lines (docs/add_a_family.md)."
    )
