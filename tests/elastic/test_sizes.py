"""Sizes that a config names are checked before anything is built, so that no config of a few lines takes all memory."""

import json
import shutil

import gguf
import pytest

import tiny
from flextron.elastic.source import source_of
from flextron.errors import CheckpointError
from flextron.model import ElasticModel

ABSURD = [10**12, 10**9, -3, 0, "7", 1.5, True, {"a": 1}]


@pytest.fixture
def changed(checkpoint, tmp_path):
    """A checkpoint whose config.json is changed."""

    def change(**fields):
        folder = shutil.copytree(checkpoint, tmp_path / "m", dirs_exist_ok=True)
        config = json.loads((checkpoint / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return folder

    return change


@pytest.mark.parametrize("value", ABSURD, ids=str)
@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads"]
)
def test_a_size_that_no_model_has_is_refused(changed, name, value):
    with pytest.raises(CheckpointError, match=rf"config.json: {name} is .*; it must be a whole number from 1 to 10"):
        ElasticModel.from_pretrained(changed(**{name: value}))


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 10**7},
        {"hidden_size": 10**6},
        {"intermediate_size": 10**7},
        {"num_key_value_heads": 10**6},
        {"num_hidden_layers": 10**4},
    ],
    ids=str,
)
def test_weights_too_small_for_the_sizes_are_refused_before_they_are_read(changed, fields):
    with pytest.raises(CheckpointError, match=r"describes at least \d+ weights, but their files have \d+ bytes"):
        source_of(changed(**fields))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_real_sizes_pass(model_type, tmp_path):
    ElasticModel(tiny.plain_model(model_type)).save_pretrained(tmp_path / "m")
    assert source_of(tmp_path / "m") == (str(tmp_path / "m"), {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a list"),
        ("{", "is not JSON"),
        ("[" * 10**5, "is not JSON"),
        (" " * 10**7 + "{}", "10000002 bytes"),
    ],
)
def test_a_config_that_is_none(changed, content, message):
    folder = changed()
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        ElasticModel.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"])
def test_a_gguf_file_with_absurd_counts_is_refused(tmp_path, name):
    sizes = {"block_count": 2, "embedding_length": 48, "feed_forward_length": 40, "attention.head_count": 6}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key, value in {**sizes, name: 2**31}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=f"a.gguf: {name} is '2147483648'; it must be a whole number"):
        ElasticModel.from_pretrained(tmp_path / "a.gguf")


@pytest.mark.parametrize("counts", [(2**60, 1), (0, 2**60), (2**63, 2**63)])
def test_a_gguf_header_that_promises_more_than_there_is(tmp_path, counts):
    tensors, fields = counts
    head = b"GGUF" + (3).to_bytes(4, "little") + tensors.to_bytes(8, "little") + fields.to_bytes(8, "little")
    (tmp_path / "a.gguf").write_bytes(head + bytes(64))
    with pytest.raises(CheckpointError, match=r"cannot load .*a.gguf") as error:
        ElasticModel.from_pretrained(tmp_path / "a.gguf")
    assert "\n" not in str(error.value)
