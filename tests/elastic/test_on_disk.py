"""Weights in files compute the same, and what cannot lie in files is refused."""

import pytest
import torch

import tiny
from flextron.elastic.on_disk import weights_on_disk
from flextron.elastic.permutation import permute
from flextron.errors import CheckpointError, FlextronError
from flextron.model import ElasticModel


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_compute_the_same_and_can_change(model_type, dtype, tmp_path):
    model = ElasticModel(tiny.plain_model(model_type).to(dtype))
    tokens, ranking = tiny.token_ids(), tiny.ranking_for(model)
    expected = tiny.logits_of(model, tokens)
    with weights_on_disk(model, tmp_path / "out"):
        assert torch.equal(tiny.logits_of(model, tokens), expected)
        permute(model, ranking)
        torch.testing.assert_close(tiny.logits_of(model, tokens).float(), expected.float(), rtol=0, atol=0.1)
        (folder,) = tmp_path.iterdir()
        assert folder.name.startswith(".out-weights-")
    assert not list(tmp_path.iterdir())


def test_another_device_is_refused(tmp_path):
    model = ElasticModel(tiny.plain_model("llama").to("meta"))
    with (
        pytest.raises(FlextronError, match=r"to the CPU only, not to meta\. Pass --device cpu\."),
        weights_on_disk(model, tmp_path / "out"),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_named(llama, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("flextron.elastic.on_disk._move", full)
    with (
        pytest.raises(CheckpointError, match=r"cannot keep weights in .*: No space left"),
        weights_on_disk(llama, tmp_path / "out"),
    ):
        pass
    assert not list(tmp_path.iterdir())
