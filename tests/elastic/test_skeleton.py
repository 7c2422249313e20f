"""Models without weights, and where their weights lie."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from flextron.elastic.model import ElasticModel
from flextron.elastic.skeleton import Stored, in_shards, skeleton, weights_of
from flextron.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    ElasticModel(tiny.plain_model("llama", vocab_size=300)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_it_has_the_sizes_and_no_weights(folder):
    model, empty = ElasticModel.from_pretrained(folder), skeleton(str(folder))
    assert empty.is_empty
    assert not model.is_empty
    assert {name: weight.shape for name, weight in weights_of(empty.lm).items()} == {
        name: weight.shape for name, weight in weights_of(model.lm).items()
    }
    for name, buffer in model.lm.named_buffers():
        torch.testing.assert_close(empty.lm.get_buffer(name), buffer)
    stored = Stored.of(str(folder))
    assert stored.fits(empty.lm)
    stored.check(empty.lm)
    assert stored.fingerprint(empty) == empty.fingerprint() == model.fingerprint()


def test_it_has_the_type_of_the_files_where_the_config_says_none(folder):
    changed(folder, lambda weights: weights.update({name: w.bfloat16() for name, w in weights.items()}))
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert skeleton(str(folder)).dtype == ElasticModel.from_pretrained(folder).dtype == torch.bfloat16


def test_a_head_of_its_own_beside_tied_embeddings_does_not_fit(tmp_path):
    lm = tiny.plain_model("llama", vocab_size=300, tie_word_embeddings=True)
    ElasticModel(lm).save_pretrained(tmp_path / "model")
    assert in_shards(str(tmp_path / "model"), skeleton(str(tmp_path / "model")).lm)
    changed(tmp_path / "model", lambda weights: weights.update({"lm_head.weight": torch.randn(300, 32)}))
    assert not in_shards(str(tmp_path / "model"), skeleton(str(tmp_path / "model")).lm)


def test_a_weight_in_two_files_does_not_fit(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: load_file(folder / "model.safetensors")[name]}, folder / "other.safetensors")
    assert not in_shards(str(folder), skeleton(str(folder)).lm)


def test_another_copy_in_the_folder_is_not_the_models(folder):
    """Mistral's repositories hold one under its own names, in consolidated.safetensors; transformers ignores it."""
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    stored, empty = Stored.of(str(folder)), skeleton(str(folder))
    stored.check(empty.lm)
    assert stored.fits(empty.lm)
    assert stored.weights == load_file(folder / "model.safetensors").keys()


def test_wrong_sizes_and_weights_without_a_place_are_named(folder):
    changed(folder, lambda weights: weights.update({"model.extra": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"no place for, such as model\.extra"):
        Stored.of(str(folder)).check(skeleton(str(folder)).lm)


@pytest.mark.real
def test_of_a_pack_the_base_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path))
    empty = skeleton("smollm2-elastic")
    assert empty.search_space.layers == 30
    assert Stored.of("smollm2-elastic") is None  # several processes load it whole
    assert not in_shards("smollm2-elastic", empty.lm)


@pytest.mark.real
def test_the_name_of_a_model_is_a_gguf_file():
    assert not in_shards("smollm2", skeleton("smollm2").lm)
    assert Stored.of("smollm2") is None
