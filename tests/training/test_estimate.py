"""The dry run of training: its numbers against real models, and its errors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, LlamaConfig, MixtralConfig, MixtralForCausalLM, T5Config

import tiny
from flextron.config import OptimizerOptions, TextOptions, TrainConfig, VisitOptions, WatchOptions
from flextron.elastic.adapters import add_adapters
from flextron.errors import CheckpointError, FlextronError, SubnetError, UnknownFamilyError
from flextron.model import ElasticModel
from flextron.subnet import SearchSpace
from flextron.training.distillation import Distiller
from flextron.training.estimate import GPU_BYTES, estimate_training, training_flops
from flextron.training.sampling import even_sensitivity

SMALL = TextOptions(tokens=16 * 8, block_tokens=16)
EXACT = ("weights", "gradients (fp32)", "optimizer states (2 x fp32)")


def config_only(folder: Path, model_type: str = "llama", **changes) -> str:
    AutoConfig.for_model(model_type, **{**tiny.CONFIGS[model_type], **changes}).save_pretrained(folder)
    return str(folder)


def asked(model: str, *, text=SMALL, visit=None, watch=None, **options) -> TrainConfig:
    optimizer = OptimizerOptions(**{"precision": "fp32", **options})
    return TrainConfig(
        model, Path("out"), text, visit or VisitOptions(), optimizer, watch or WatchOptions(evaluate_on=())
    )


def as_trained(model: ElasticModel, *, train_embeddings: bool = False, lora_rank: int = 0) -> list[torch.nn.Parameter]:
    """Return the parameters that training gives to its optimizer."""
    if lora_rank:
        add_adapters(model, rank=lora_rank)
    for embedding in (model.lm.get_input_embeddings(), model.lm.get_output_embeddings()):
        embedding.requires_grad_(train_embeddings)
    return [parameter for parameter in model.lm.parameters() if parameter.requires_grad]


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ------------------------------------------------------------------ exact parts


@pytest.mark.parametrize("options", [{}, {"train_embeddings": True}, {"lora_rank": 3}])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_weights_gradients_and_states_are_those_of_a_real_step(model_type, options, tmp_path):
    if "lora_rank" in options:
        pytest.importorskip("peft")
    model = ElasticModel(tiny.plain_model(model_type))
    parameters = as_trained(model, **options)
    optimizer = torch.optim.AdamW(parameters)
    model(tiny.token_ids(), labels=tiny.token_ids()).loss.backward()
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    real = (size(model.lm.parameters()), size(p.grad for p in parameters), size(states))

    found = estimate_training(asked(config_only(tmp_path, model_type), **options))
    assert tuple(found.memory[part] for part in EXACT) == real
    assert found.trained_parameters == sum(p.numel() for p in parameters)
    assert found.checkpoint_bytes == size(parameters) + size(states)


@pytest.mark.parametrize("model_type", tiny.CONFIGS)
def test_every_family_is_counted_without_weights(model_type, tmp_path):
    model = ElasticModel(tiny.plain_model(model_type))
    found = estimate_training(asked(config_only(tmp_path, model_type)))
    assert found.parameters == sum(p.numel() for p in model.lm.parameters())
    assert found.trained_parameters == sum(p.numel() for p in as_trained(model))


def test_sharding_divides_weights_gradients_states_and_teacher(tmp_path):
    config = asked(config_only(tmp_path), visit=VisitOptions(blocks_per_visit=4), precision="bf16")
    alone, shared = estimate_training(config), estimate_training(config, processes=4)
    for part in (*EXACT, "teacher"):
        assert shared.memory[part] == alone.memory[part] // 4 > 0
    assert shared.loading_bytes == 0
    assert shared.memory["activations, about"] < alone.memory["activations, about"] / 3


def test_what_each_process_keeps_whole_is_divided_by_nothing_but_the_blocks(tmp_path):
    config = asked(config_only(tmp_path), visit=VisitOptions(blocks_per_visit=4), precision="bf16")
    alone, whole = estimate_training(config), estimate_training(replace(config, replicate=True), processes=4)
    for part in (*EXACT, "teacher", "copies for the arithmetic, about"):
        assert whole.memory[part] == alone.memory[part] > 0
    assert whole.memory["activations, about"] == alone.memory["activations, about"] // 4


def test_weights_by_other_names_are_loaded_whole_by_the_first_process(tmp_path):
    """Mixtral's files hold its experts one by one, the model holds them together."""
    tiny.plain_model("llama").save_pretrained(tmp_path / "llama")
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    llama, mixtral = (
        estimate_training(asked(str(tmp_path / name), visit=VisitOptions(blocks_per_visit=2)), processes=2)
        for name in ("llama", "mixtral")
    )
    assert llama.loading_bytes == 0
    assert mixtral.loading_bytes == 4 * mixtral.parameters
    assert "first process, while loading" in str(mixtral)
    assert "while loading" not in str(llama)


def test_teacher_is_kept_in_the_type_of_the_arithmetic_if_at_all(tmp_path):
    folder = config_only(tmp_path / "model")
    small = config_only(tmp_path / "small", num_hidden_layers=1)
    teachers = {
        options: estimate_training(asked(folder, **dict([options]))).memory["teacher"]
        for options in [("precision", "fp32"), ("precision", "bf16"), ("text_weight", 1.0), ("lora_rank", 2)]
    }
    parameters = estimate_training(asked(folder)).parameters
    assert list(teachers.values()) == [4 * parameters, 2 * parameters, 0, 0]
    of_small = estimate_training(asked(folder, teacher=small)).memory["teacher"]
    assert of_small == estimate_training(asked(small)).memory["teacher"] < teachers["precision", "fp32"]


# ------------------------------------------------------------------ rough parts


def kept_bytes(lm, tokens: torch.Tensor, precision: str) -> int:
    """Return the bytes that one forward pass keeps, without parameters and their copies under autocast."""
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    matrices = {tuple(p.shape[::step]) for p in lm.parameters() if p.ndim == 2 for step in (1, -1)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tuple(tensor.shape) not in matrices:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    positions = torch.arange(tokens.shape[1]).remainder(tokens.shape[1] // 2).expand(tokens.shape)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        lm.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox", "gemma2", "gpt2", "gemma3_text", "phi"])
def test_activations_are_about_what_autograd_keeps(model_type, precision, tmp_path):
    lm = tiny.plain_model(model_type)
    as_trained(ElasticModel(lm))
    real = kept_bytes(lm, tiny.token_ids(rows=7, time=32), precision)
    config = asked(
        config_only(tmp_path, model_type),
        text=TextOptions(block_tokens=32),
        visit=VisitOptions(blocks_per_visit=7),
        precision=precision,
    )
    assert estimate_training(config).memory["activations, about"] == pytest.approx(real, rel=0.2)


def test_gradient_checkpointing_keeps_about_one_layer(tmp_path):
    folder = config_only(tmp_path, num_hidden_layers=20)
    plain, less = (estimate_training(asked(folder, gradient_checkpointing=on)) for on in (False, True))
    assert less.memory["activations, about"] < plain.memory["activations, about"] / 5
    assert {**less.memory, "activations, about": 0} == {**plain.memory, "activations, about": 0}


# ------------------------------------------------------------------ steps and compute


def test_steps_are_rounded_up_to_whole_ones(tmp_path):
    visit = VisitOptions(visits_per_step=3, blocks_per_visit=2)
    found = estimate_training(asked(config_only(tmp_path), text=TextOptions(tokens=1000, block_tokens=16), visit=visit))
    assert (found.tokens_per_step, found.steps, found.tokens) == (96, 11, 1056)


class MatrixProducts(TorchDispatchMode):
    """Counts the operations of all matrix products except batched ones, which belong to attention."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("model_type", ["mistral", "qwen3"])
def test_flops_are_those_of_the_matrix_products(model_type, share, taught):
    teacher = tiny.plain_model(model_type, attention_bias=False) if taught else None
    model = ElasticModel(tiny.plain_model(model_type, attention_bias=False))
    as_trained(model)
    subnet = even_sensitivity(model).allocate(share)
    student = Distiller(model.lm, teacher, text_weight=0.0 if taught else 1.0)
    tokens = tiny.token_ids(rows=2, time=16)
    with model.use(subnet), MatrixProducts() as products:
        student(tokens).total.backward()
    of_last = len(tokens) * (6 if taught else 4) * tiny.HIDDEN * tiny.VOCAB  # the last tokens predict nothing
    assert products.flops == training_flops(model, subnet, teacher=taught) * tokens.numel() - of_last


def test_compute_of_a_step_is_between_its_bounds(tmp_path):
    folder = config_only(tmp_path)
    taught = estimate_training(asked(folder))
    alone = estimate_training(asked(folder, text_weight=1.0))
    full = estimate_training(asked(folder, text_weight=1.0, lora_rank=2))
    assert 0.5 < alone.step_compute == alone.visit_compute == taught.visit_compute < 1
    assert alone.step_compute < taught.step_compute < alone.step_compute + 0.5
    assert full.step_compute < alone.step_compute
    only_full = VisitOptions(visits=(1, 0, 0, 0))
    assert estimate_training(asked(folder, visit=only_full, text_weight=1.0)).step_compute == 1


# ------------------------------------------------------------------ reading, printing and errors


def test_elastic_checkpoint_gives_its_search_space(tmp_path):
    space = SearchSpace(tiny.LAYERS, (0, 13, tiny.NEURONS), (0, 3))
    ElasticModel(tiny.plain_model("llama"), search_space=space).save_pretrained(tmp_path / "elastic")
    folder = str(tmp_path / "elastic")
    estimate_training(asked(folder, visit=VisitOptions(smallest="neurons=13")))
    with pytest.raises(SubnetError, match="20, not a choice of the search space"):
        estimate_training(asked(folder, visit=VisitOptions(smallest="neurons=20")))


def test_printed_table_names_parts_units_and_warnings(tmp_path):
    config = LlamaConfig()
    config.save_pretrained(tmp_path)
    text = TextOptions(tokens=10**6, block_tokens=4096)
    found = estimate_training(
        asked(str(tmp_path), text=text, visit=VisitOptions(visits_per_step=4, blocks_per_visit=2)), processes=2
    )
    lines = str(found).splitlines()
    assert lines[1] == "weights  6,738.4 M, trained 6,476.3 M"
    assert "31 of 4 visits x 2 blocks x 4096 tokens: 32,768 tokens per step, 1,015,808 in total" in lines[2]
    assert "memory   of each of 2 processes, arithmetic in float32" in lines
    assert f"  {'gradients (fp32)':<34}   12.95 GB" in lines
    assert not any("loading" in line for line in lines)
    assert lines[-3] == "disk     up to 3 checkpoints of 77.72 GB"
    assert found.total_bytes > GPU_BYTES
    assert "more than the 80 GB of a large GPU. Pass --gradient-checkpointing, --lora-rank 16, a lower" in lines[-2]
    assert lines[-1] == "warning: blocks have 4096 tokens, but the model supports 2048. Pass a lower --block-tokens."


def test_one_small_process_is_not_warned(tmp_path):
    found = estimate_training(asked(config_only(tmp_path), text_weight=1.0))
    assert found.warnings == []
    for absent in ("teacher", "loading", "warning", "copies"):
        assert absent not in str(found)


def test_missing_and_unknown_models_are_refused(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        estimate_training(asked(str(tmp_path / "none")))
    with pytest.raises(CheckpointError, match=r"broken.config.json is not JSON"):
        estimate_training(asked(str(tmp_path / "broken")))
    with pytest.raises(UnknownFamilyError, match="cannot narrow the architecture 't5'"):
        estimate_training(asked(str(tmp_path / "t5")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visit": VisitOptions(smallest="neurons=7")}, "not a choice"),
        ({"visit": VisitOptions(presets=("kv_groups=9",))}, "a layer of this model has 3"),
        ({"visit": VisitOptions(smallest="full")}, "the smallest sub-network is the full model"),
        ({"visit": VisitOptions(visits=(1, 1, 1, 1))}, "none is named"),
        ({"watch": WatchOptions(evaluate_on=("half",))}, "cannot read the sub-network 'half'"),
    ],
)
def test_sub_networks_that_a_run_would_refuse(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        estimate_training(asked(config_only(tmp_path), **changes))


def test_blocks_must_be_shared_evenly(tmp_path):
    config = asked(config_only(tmp_path), visit=VisitOptions(blocks_per_visit=12))
    assert estimate_training(config, processes=4).processes == 4
    message = "blocks_per_visit is 12, which 8 processes cannot share evenly. Pass --blocks-per-visit 16"
    with pytest.raises(ValueError, match=message):
        estimate_training(config, processes=8)
    with pytest.raises(ValueError, match="got 0 processes"):
        estimate_training(config, processes=0)


def test_teacher_must_have_the_same_vocabulary(tmp_path):
    teacher = config_only(tmp_path / "teacher", vocab_size=77)
    with pytest.raises(FlextronError, match="a vocabulary of 77, the model one of 101"):
        estimate_training(asked(config_only(tmp_path / "model"), teacher=teacher))
