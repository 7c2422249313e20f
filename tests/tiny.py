"""Tiny seeded models, tokenizers and texts, and the masked model that defines what a sub-network computes."""

import copy
from dataclasses import replace
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from flextron.data.blocks import TokenBlocks
from flextron.elastic.checkpoint import Ranking
from flextron.elastic.families import FAMILIES, Family
from flextron.ranking.sensitivity import Sensitivity
from flextron.subnet import AXES, SearchSpace, Subnet
from flextron.training.sampling import even_sensitivity

LAYERS = 3
HIDDEN = 48
NEURONS = 40
HEADS = 6
KV_GROUPS = 3
VOCAB = 101
WINDOW = 6  # of sliding attention: shorter than the texts and generations of the tests
TIME = 16

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": KV_GROUPS}
_OWN_HEAD_SIZE = {**_GROUPED, "head_dim": 16, "attention_bias": True}
_S, _F = "sliding_attention", "full_attention"
CONFIGS = {
    "llama": {**_OWN_HEAD_SIZE, "mlp_bias": True},
    "mistral": {**_GROUPED, "head_dim": 16, "sliding_window": WINDOW},
    "qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [_F, _S, _S]},
    "qwen3": _OWN_HEAD_SIZE,
    "smollm3": {**_GROUPED, "attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 0, 1]},
    "gemma2": {**_OWN_HEAD_SIZE, "sliding_window": WINDOW, "layer_types": [_S, _F, _S]},
    "gemma3_text": {**_OWN_HEAD_SIZE, "sliding_window": WINDOW, "layer_types": [_S, _S, _F]},
    "granite": {**_GROUPED, "attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.7},
    "gpt2": {**_COMMON, "n_inner": NEURONS, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": _COMMON,
    "phi": {**_GROUPED, "qk_layernorm": True},
}


def plain_model(model_type: str, **changes) -> torch.nn.Module:
    """A transformers model in eval mode; every parameter is random, biases and norms too, so that mistakes show."""
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    lm = AutoModelForCausalLM.from_config(config).eval()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() == 2:
                parameter.copy_(noise * (0.5 if "emb" in name or "wte" in name else HIDDEN**-0.5))
            else:
                parameter.copy_(parameter + 0.3 * noise)
    return lm


def token_ids(rows: int = 2, time: int = TIME, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Random tokens [rows, time], none of them the padding."""
    return torch.randint(1, vocab, (rows, time), generator=torch.Generator().manual_seed(seed))


def blocks(rows: int = 8, time: int = TIME, vocab: int = VOCAB, seed: int = 0) -> TokenBlocks:
    """Random token blocks of 3 bytes a token."""
    tokens = token_ids(rows, time, vocab, seed)
    return TokenBlocks(tokens, torch.full_like(tokens, 3), "random")


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def assert_same_function(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def differs(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two models compute something clearly else."""
    return logits.shape != expected.shape or (logits - expected).abs().max().item() > 1e-2


def random_subnet(space: SearchSpace, seed: int, **fixed: tuple[int, ...]) -> Subnet:
    """Widths drawn layer by layer, 0 and full among them."""
    draw = torch.Generator().manual_seed(seed)

    def widths(choices: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(choices[place] for place in torch.randint(len(choices), (space.layers,), generator=draw))

    return Subnet(**{"neurons": widths(space.neurons), "kv_groups": widths(space.kv_groups), **fixed})


def random_ranking(neurons: int, groups: int, heads: int, seed: int = 0, layers: int = LAYERS) -> Ranking:
    draw = torch.Generator().manual_seed(seed)

    def orders(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=draw).argsort(-1).int()

    return Ranking(
        orders(layers, neurons),
        orders(layers, groups),
        orders(layers, groups, heads),
        score="random",
        tokens=0,
        text="",
    )


def ranking_for(model, seed: int = 0) -> Ranking:
    """A random ranking of the shape of an `ElasticModel`."""
    first = model.layers[0]
    sizes = (first.mlp.width.full, first.attention.width.full, first.attention.heads_per_unit)
    return random_ranking(*sizes, seed=seed, layers=len(model.layers))


def in_nats(even: Sensitivity) -> Sensitivity:
    """Even sensitivities, which are in weights, with increases of at most 1."""
    biggest = max(max(map(max, rows)) for rows in even.increases.values())
    return replace(
        even,
        increases={
            axis: tuple(tuple(x / biggest for x in row) for row in rows) for axis, rows in even.increases.items()
        },
    )


def uneven_sensitivity(model) -> Sensitivity:
    """Sub-layers worth more and less, so that the greedy choice differs from layer to layer."""
    even = in_nats(even_sensitivity(model))
    worth = {"neurons": (1.0, 0.4, 2.0), "kv_groups": (0.7, 1.5, 1.0)}
    increases = {
        axis: tuple(
            tuple(increase * factor for increase in row)
            for row, factor in zip(even.increases[axis], worth[axis], strict=True)
        )
        for axis in AXES
    }
    return replace(even, increases=increases)


def closing_matrix(lm, family: Family, layer: int, axis: str) -> torch.Tensor:
    """The closing projection of a sub-layer as [out, in], a view."""
    return _oriented(_closing(lm, family, layer, axis))


@torch.no_grad()
def masked(lm, subnet: Subnet, *, groups: int, ranking: Ranking | None = None, family: Family | None = None):
    """A copy of a plain model that computes, by its plain code, what `subnet` means.

    The closing projection's columns of every unit left out are zero; of a sub-layer of width 0, its bias too. With a
    ranking, the units kept are the original ones that it names.
    """
    family = family or FAMILIES[lm.config.model_type]
    result = copy.deepcopy(lm)
    for layer in range(subnet.layers):
        for axis, widths in (("mlp", subnet.neurons), ("attention", subnet.kv_groups)):
            closing = _closing(result, family, layer, axis)
            matrix = _oriented(closing)
            units = matrix.shape[1] if axis == "mlp" else groups
            order = torch.arange(units)
            if ranking is not None:
                order = (ranking.neurons if axis == "mlp" else ranking.kv_groups)[layer].long()
            dropped = order[widths[layer] :]
            matrix.unflatten(1, (units, -1))[:, dropped] = 0
            if widths[layer] == 0 and closing.bias is not None:
                closing.bias.zero_()
    return result


def _closing(lm, family: Family, layer: int, axis: str) -> torch.nn.Module:
    return lm.get_submodule(family.layers)[layer].get_submodule(getattr(family, axis).closes)


def _oriented(projection: torch.nn.Module) -> torch.Tensor:
    weight = projection.weight
    return weight if isinstance(projection, torch.nn.Linear) else weight.t()


TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.\n"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few merges: characters beyond ASCII are split across tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")  # noqa: S106
