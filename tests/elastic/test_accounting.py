"""Every weight of a checkpoint has its place, flags follow weights, and GGUF files give the model that was written."""

import copy
import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from flextron import ElasticModel, export, export_gguf
from flextron.elastic.gguf_source import ROPE_KEY
from flextron.elastic.older_transformers import add_old_names
from flextron.errors import CheckpointError

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def folder(plain_llama, tmp_path):
    plain_llama.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def change(folder, weights=(), **config) -> None:
    """Put other weights and config fields into a checkpoint."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **dict(weights)}, file, metadata={"format": "pt"})
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **config}))


class TestWeights:
    def test_one_without_a_place_is_refused_by_name(self, folder):
        change(folder, mlp_bias=False)
        with pytest.raises(CheckpointError, match=r"9 weights that its architecture .* such as .*mlp.*bias"):
            ElasticModel.from_pretrained(folder)

    def test_one_that_is_missing_is_refused_by_name(self, folder):
        change(folder, num_hidden_layers=4)
        with pytest.raises(CheckpointError, match=r"weights are missing, such as model\.layers\.3"):
            ElasticModel.from_pretrained(folder)

    def test_another_size_is_refused_with_both(self, folder):
        change(folder, intermediate_size=32)
        with pytest.raises(CheckpointError, match=r"down_proj.weight is \[48, 40\], the config asks for \[48, 32\]"):
            ElasticModel.from_pretrained(folder)

    def test_rotary_tables_and_masks_of_old_checkpoints_may_be_left_out(self, folder, plain_llama):
        table = torch.ones(8)
        change(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": table})
        tokens = tiny.token_ids()
        found = tiny.logits_of(ElasticModel.from_pretrained(folder), tokens)
        assert torch.equal(found, tiny.logits_of(plain_llama, tokens))


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", 5])
def test_an_index_may_name_shards_of_its_own_folder_only(folder, shard):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        ElasticModel.from_pretrained(folder)


class TestUntied:
    """config.json says that the output projection is the embedding, and the file has both."""

    @pytest.fixture
    def apart(self, folder):
        change(folder, tie_word_embeddings=True)
        return folder

    @pytest.mark.parametrize("verify", [True, False])
    def test_exports_keep_both(self, apart, plain_llama, tmp_path, verify):
        model = ElasticModel.from_pretrained(apart)
        export(model, model.search_space.full, tmp_path / "out", verify=verify)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        tokens = tiny.token_ids()
        tiny.assert_same_function(tiny.logits_of(again, tokens), tiny.logits_of(plain_llama, tokens))

    def test_saved_it_says_so(self, apart, tmp_path):
        ElasticModel.from_pretrained(apart).save_pretrained(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False

    def test_a_gguf_file_has_both(self, tmp_path):
        lm = tiny.plain_model("llama", vocab_size=300)
        lm.save_pretrained(tmp_path / "plain")
        change(tmp_path / "plain", tie_word_embeddings=True)
        model = ElasticModel.from_pretrained(tmp_path / "plain")
        model.tokenizer = tiny.tokenizer()
        export_gguf(model, model.search_space.full, tmp_path / "x.gguf", quantize="f32", verify=False)
        assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}


class TestGguf:
    def write(self, tmp_path, **changes):
        lm = tiny.plain_model("llama", vocab_size=300, head_dim=None, **changes)
        model = ElasticModel(lm, tiny.tokenizer())
        export_gguf(model, model.search_space.full, tmp_path / "x.gguf", quantize="f32", verify=False)
        return lm, tmp_path / "x.gguf"

    @pytest.mark.parametrize(
        "changes",
        [
            {"attention_bias": False, "mlp_bias": False},
            {"attention_bias": True, "mlp_bias": False},
            {"attention_bias": False, "mlp_bias": True},
            {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}},
        ],
        ids=["plain", "attention biases", "MLP biases", "rope of our own file"],
    )
    def test_read_back_it_is_the_model_that_was_written(self, tmp_path, changes):
        lm, file = self.write(tmp_path, **changes)
        tokens = tiny.token_ids()
        found = tiny.logits_of(ElasticModel.from_pretrained(file, dtype="float32"), tokens)
        tiny.assert_same_function(found, tiny.logits_of(lm, tokens))

    @pytest.mark.parametrize("known", [True, False])
    def test_scaled_frequencies_of_other_tools_are_recognised_or_refused(self, tmp_path, known):
        rope = {**LLAMA3, "original_max_position_embeddings": 8192 if known else 4096}
        lm, file = self.write(tmp_path, rope_parameters=rope)
        without(file, ROPE_KEY)
        if not known:
            with pytest.raises(CheckpointError, match=r"scales its rotary frequencies \(rope_freqs\.weight\)"):
                ElasticModel.from_pretrained(file)
            return
        tokens = tiny.token_ids()
        found = tiny.logits_of(ElasticModel.from_pretrained(file, dtype="float32"), tokens)
        tiny.assert_same_function(found, tiny.logits_of(lm, tokens))

    def test_a_tensor_without_a_place_is_refused_by_name(self, tmp_path):
        _, file = self.write(tmp_path, attention_bias=False, mlp_bias=False)
        without(file, "", {"blk.0.attn_sinks.weight": np.ones(6, dtype=np.float32)})
        with pytest.raises(CheckpointError, match=r"1 tensors .* no place for, such as blk\.0\.attn_sinks\.weight"):
            ElasticModel.from_pretrained(file)


def without(file, key: str, more=None) -> None:
    """Write a GGUF file anew without one key of its metadata, and with more tensors."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(file.with_name("new.gguf"), arch=reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name not in (key, "general.architecture") and not name.startswith("GGUF."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, data in (more or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_name("new.gguf").replace(file)


@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_names_of_transformers_4_stand_beside_those_of_5(model_type, tmp_path):
    lm = tiny.plain_model(model_type)
    ElasticModel(copy.deepcopy(lm)).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    rope = config.get("rope_parameters")
    if rope is None:
        assert model_type == "gpt2"
        return
    main = rope.get("full_attention", rope)
    assert config["rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"] == main["rope_theta"]
    assert "rope_scaling" not in config
    if model_type == "gemma3_text":
        assert config["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    part = {"gpt_neox": "rotary_pct", "phi": "partial_rotary_factor"}.get(model_type)
    assert part is None or config[part] == main["partial_rotary_factor"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = tiny.token_ids()
    assert torch.equal(tiny.logits_of(again, tokens), tiny.logits_of(lm, tokens))


def test_a_scaled_rope_is_stated_in_both_ways(tmp_path):
    rope = {**LLAMA3, "original_max_position_embeddings": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_parameters": rope}))
    add_old_names(tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
