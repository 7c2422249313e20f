"""The checkpoint folder: what is written comes back, and what is broken is refused by name."""

import copy
import json
import os
import pickle
import shutil
from dataclasses import replace

import gguf
import pytest
import torch
from gguf.gguf_reader import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

import tiny
from flextron.elastic import checkpoint, source
from flextron.elastic.permutation import permute
from flextron.elastic.source import METADATA_FILE, RANKING_FILE
from flextron.errors import CheckpointError, UnknownFamilyError
from flextron.exporting.gguf.file import export_gguf
from flextron.model import ElasticModel
from flextron.subnet import SearchSpace
from folders import names

WEIGHTS_FILE = "model.safetensors"
SPACE = SearchSpace(tiny.LAYERS, (0, 8, tiny.NEURONS), (0, 1, tiny.KV_GROUPS))


@pytest.fixture(scope="module", autouse=True)
def quiet():
    checkpoint.quiet_transformers()


@pytest.fixture(scope="module")
def written(plain_llama, tmp_path_factory):
    """A ranked checkpoint with a tokenizer, to copy and break."""
    model = ElasticModel(copy.deepcopy(plain_llama), tiny.tokenizer(), search_space=SPACE)
    permute(model, replace(tiny.ranking_for(model), score="absolute", tokens=1234, text="a text"))
    folder = tmp_path_factory.mktemp("written") / "elastic"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of `written` that a test may break."""
    return shutil.copytree(written, tmp_path / "elastic")


def cut(file, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def change_json(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as error:
        ElasticModel.from_pretrained(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestRoundTrip:
    def test_search_space_and_ranking(self, written):
        model = ElasticModel.from_pretrained(written)
        assert model.search_space == SPACE
        assert model.subnet == SPACE.full
        ranking = model.ranking
        assert (ranking.score, ranking.tokens, ranking.text) == ("absolute", 1234, "a text")
        assert torch.equal(ranking.neurons, tiny.ranking_for(model).neurons)
        assert ranking.query_heads.dtype == torch.int32

    def test_tokenizer(self, written):
        for tokenizer in (ElasticModel.from_pretrained(written).tokenizer, AutoTokenizer.from_pretrained(written)):
            assert tokenizer.encode(tiny.TEXT) == tiny.tokenizer().encode(tiny.TEXT)
        config = json.loads((written / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows this one

    def test_special_tokens_added_later_stay_and_are_stated_as_transformers_4_reads_them(self, tmp_path):
        tokenizer = copy.deepcopy(tiny.tokenizer())
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>", "<|é|>"]})
        ElasticModel(tiny.plain_model("llama", vocab_size=302), tokenizer).save_pretrained(tmp_path / "out")
        again = ElasticModel.from_pretrained(tmp_path / "out").tokenizer
        ids = tokenizer("a <|tool|> b<|é|>").input_ids
        assert ids[-1] == 301
        assert again("a <|tool|> b<|é|>").input_ids == ids
        assert again.decode(ids, skip_special_tokens=True) == "a  b"
        config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
        assert config["additional_special_tokens"] == ["<|tool|>", "<|é|>"]
        assert "extra_special_tokens" not in config

    def test_a_tokenizer_in_python_comes_along(self, tmp_path):
        ElasticModel(tiny.plain_model("llama", vocab_size=400), ByT5Tokenizer()).save_pretrained(tmp_path / "out")
        again = ElasticModel.from_pretrained(tmp_path / "out").tokenizer
        text = "é<extra_id_3> b"
        assert again(text).input_ids == ByT5Tokenizer()(text).input_ids

    def test_a_plain_folder_has_no_ranking(self, plain_llama, tmp_path):
        plain_llama.save_pretrained(tmp_path)
        model = ElasticModel.from_pretrained(tmp_path)
        assert (model.ranking, model.tokenizer) == (None, None)
        assert model.search_space == SearchSpace.of_model(layers=3, neurons=tiny.NEURONS, kv_groups=tiny.KV_GROUPS)

    def test_a_search_space_that_is_asked_for_goes_first(self, written):
        wanted = SearchSpace(tiny.LAYERS, (16, tiny.NEURONS), (tiny.KV_GROUPS,))
        assert ElasticModel.from_pretrained(written, search_space=wanted).search_space == wanted

    def test_dtype_and_mode(self, written):
        model = ElasticModel.from_pretrained(written, dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16
        assert not model.lm.training
        assert ElasticModel.from_pretrained(written).dtype == torch.float32

    def test_saving_a_loaded_model_over_itself(self, folder):
        """The weights in memory may be a map of the very file that is replaced."""
        model = ElasticModel.from_pretrained(folder)
        before = load_file(folder / WEIGHTS_FILE)
        model.save_pretrained(folder, overwrite=True)
        assert all(torch.equal(value, before[name]) for name, value in load_file(folder / WEIGHTS_FILE).items())


class TestWriting:
    def test_an_existing_folder_is_kept(self, llama, tmp_path):
        (tmp_path / "there").mkdir()
        message = f"{tmp_path / 'there'} exists. Name another folder or pass --overwrite."
        with pytest.raises(CheckpointError) as error:
            llama.save_pretrained(tmp_path / "there")
        assert str(error.value) == message
        assert list((tmp_path / "there").iterdir()) == []

    def test_overwrite_leaves_nothing_of_the_old(self, llama, folder):
        (folder / "old.txt").write_text("old")
        llama.save_pretrained(folder, overwrite=True)
        assert not (folder / "old.txt").exists()
        assert not (folder / RANKING_FILE).exists()
        assert ElasticModel.from_pretrained(folder).ranking is None

    def test_a_model_larger_than_the_disk(self, llama, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
        with pytest.raises(CheckpointError, match=r"no space for .* nothing was written"):
            llama.save_pretrained(tmp_path / "new")
        assert list(tmp_path.iterdir()) == []

    def test_a_write_that_fails_midway(self, llama, tmp_path, monkeypatch):
        def no_space(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "save_tokenizer", no_space)  # after the weights
        with pytest.raises(CheckpointError, match=r"cannot write .*new: .*No space left.* Nothing of it was kept\."):
            llama.save_pretrained(tmp_path / "new")
        assert list(tmp_path.iterdir()) == []


class TestBrokenWeights:
    @pytest.mark.parametrize("share", [0, 0.1, 0.999], ids=str)
    def test_truncated(self, folder, share):
        cut(folder / WEIGHTS_FILE, int((folder / WEIGHTS_FILE).stat().st_size * share))
        said = refusal(folder)
        assert "header" in said or "they are cut off, or of another model" in said

    def test_absent(self, folder):
        (folder / WEIGHTS_FILE).unlink()
        assert "no file named model.safetensors" in refusal(folder)

    def test_a_tensor_missing(self, folder):
        weights = load_file(folder / WEIGHTS_FILE)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        message = "is incomplete: 1 weights are missing, such as model.layers.1.mlp.up_proj.weight."
        assert message in refusal(folder)

    def test_a_tensor_of_another_size(self, folder):
        change_json(folder / "config.json", intermediate_size=tiny.NEURONS + 8)
        refusal(folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_weight_that_is_no_number(self, folder, value):
        weights = load_file(folder / WEIGHTS_FILE)
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        assert "is damaged: model.layers.1.mlp.up_proj.weight has values that are no numbers" in refusal(folder)

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            (
                {"num_hidden_layers": 10**9},
                "num_hidden_layers is '1000000000'; it must be a whole number from 1 to 10000",
            ),
            ({"intermediate_size": 10**9}, "intermediate_size is '1000000000'; it must be a whole number"),
            ({"intermediate_size": 10**5}, "weights"),
            ({"vocab_size": 10**12}, "vocab_size is '1000000000000'; it must be a whole number"),
            ({"rms_norm_eps": float("nan")}, "config.json has NaN for rms_norm_eps"),
            ({"max_position_embeddings": -1}, "max_position_embeddings is '-1'; it must be a whole number"),
        ],
    )
    def test_a_config_that_cannot_be(self, folder, changes, problem):
        change_json(folder / "config.json", **changes)
        assert problem in refusal(folder)

    def test_pickled_weights_are_never_read(self, folder):
        """A pickle can run any code: this one would make a folder."""
        (folder / WEIGHTS_FILE).unlink()
        trap = folder.parent / "trap"
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(str(trap))))
        assert "no file named model.safetensors" in refusal(folder)
        assert not trap.exists()
        pickle.loads((folder / "pytorch_model.bin").read_bytes())  # noqa: S301
        assert trap.exists()  # it was armed

    @pytest.mark.parametrize(
        "content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40], ids=["empty", "cut", "garbled"]
    )
    def test_gguf(self, tmp_path, content):
        (tmp_path / "model.gguf").write_bytes(content)
        refusal(tmp_path / "model.gguf")


def test_a_gguf_file_is_read_once(tmp_path, monkeypatch):
    """In each loading, by flextron and by transformers together; afterwards gguf is as before."""
    model = ElasticModel(tiny.plain_model("llama", vocab_size=300), tiny.tokenizer())
    export_gguf(model, model.search_space.full, tmp_path / "model.gguf", quantize="f32", verify=False)
    read, before = [], GGUFReader.__init__
    monkeypatch.setattr(GGUFReader, "__init__", lambda self, path: (read.append(path), before(self, path))[1])
    table_of_names = gguf.get_tensor_name_map
    for times in (1, 2):
        loaded = ElasticModel.from_pretrained(tmp_path / "model.gguf", dtype="float32")
        assert len(read) == times
    assert gguf.GGUFReader is GGUFReader
    assert gguf.get_tensor_name_map is table_of_names
    assert torch.equal(tiny.logits_of(loaded, tiny.token_ids()), tiny.logits_of(model, tiny.token_ids()))


class Trap:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestBrokenConfig:
    def test_no_folder(self, tmp_path):
        message = f"no such checkpoint: {tmp_path / 'gone'}. Name a folder, a hub id such as org/name, or a .gguf file."
        assert refusal(tmp_path / "gone") == message

    def test_a_file(self, folder):
        assert refusal(folder / WEIGHTS_FILE).startswith("no such checkpoint: ")

    def test_no_gguf_file(self, tmp_path):
        assert refusal(tmp_path / "gone.gguf") == f"no such file: {tmp_path / 'gone.gguf'}"

    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        assert refusal(folder).startswith(f"{folder} is not whole: it lacks config.json. Copy the folder again")
        for file in (METADATA_FILE, RANKING_FILE):
            (folder / file).unlink()
        assert refusal(folder) == f"{folder} is not a checkpoint: it has no config.json."

    @pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
    def test_garbled(self, folder, content):
        (folder / "config.json").write_text(content)
        refusal(folder)

    @pytest.mark.parametrize("heads", [0, 5, "six"])
    def test_impossible(self, folder, heads):
        change_json(folder / "config.json", num_attention_heads=heads)
        refusal(folder)

    @pytest.mark.parametrize(("model_type", "message"), [("nonesuch", "`nonesuch`"), ("t5", "T5Config")])
    def test_unknown_to_transformers(self, folder, model_type, message):
        change_json(folder / "config.json", model_type=model_type)
        assert message in refusal(folder)

    def test_unknown_to_us(self, tmp_path):
        config = {"vocab_size": 50, "hidden_size": 16, "n_layer": 1, "n_head": 2}
        AutoModelForCausalLM.from_config(tiny.AutoConfig.for_model("bloom", **config)).save_pretrained(tmp_path)
        with pytest.raises(UnknownFamilyError, match="'bloom'"):
            ElasticModel.from_pretrained(tmp_path)

    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
    def test_tokenizer(self, folder, file):
        cut(folder / file, 25)
        refusal(folder)


class TestHalfACheckpoint:
    """What a copy leaves that ended halfway never loads as a model with less, such as one that is not ranked."""

    @pytest.fixture
    def ranked(self, tmp_path, written):
        ElasticModel.from_pretrained(written).save_pretrained(tmp_path / "elastic", beside={"rank.json": "{}"})
        return tmp_path / "elastic"

    def test_whole(self, ranked):
        assert ElasticModel.from_pretrained(ranked).ranking is not None
        listed = json.loads((ranked / METADATA_FILE).read_text())["files"]
        assert sorted([*listed, METADATA_FILE]) == names(ranked)

    @pytest.mark.parametrize("file", ["config.json", "rank.json", RANKING_FILE, "tokenizer.json"])
    def test_without_one_file(self, ranked, file):
        (ranked / file).unlink()
        assert f"{ranked} is not whole: it lacks {file}. Copy the folder again" in refusal(ranked)

    @pytest.mark.parametrize("stays", ["rank.json", "ranking.safetensors"])
    def test_without_the_last_file(self, ranked, stays):
        (ranked / METADATA_FILE).unlink()
        for other in {"rank.json", "ranking.safetensors"} - {stays}:
            (ranked / other).unlink()
        assert refusal(ranked) == (
            f"{ranked} has {stays} but no flextron.json: it is not whole. Copy the folder again, or make it again."
        )

    def test_a_training_run_that_is_not_done(self, ranked):
        (ranked / METADATA_FILE).unlink()
        (ranked / "train.json").write_text("{}")
        assert "it is a training run that is not done. Run the same `flextron train` again" in refusal(ranked)

    def test_one_that_lists_no_files(self, ranked):
        """As flextron 0.1.0 wrote it."""
        change_json(ranked / METADATA_FILE, files=[])
        (ranked / "generation_config.json").unlink()
        assert ElasticModel.from_pretrained(ranked).ranking is not None

    def test_a_name_that_a_killed_run_left_hidden(self, ranked):
        (ranked.parent / ".elastic.old-1").mkdir()
        ranked.rename(ranked.parent / ".elastic.old-1" / "elastic")
        assert f"bring it back: mv {ranked.parent}/.elastic.old-1/elastic {ranked}" in refusal(ranked)


class TestBrokenMetadata:
    @pytest.mark.parametrize(
        "content", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 1, "search_space": "all"}']
    )
    def test_unreadable(self, folder, content):
        (folder / METADATA_FILE).write_text(content)
        assert METADATA_FILE in refusal(folder)

    @pytest.mark.parametrize(
        "field",
        [
            *({"layers": "3"}, {"layers": 3.0}, {"layers": 4}),
            *({"neurons": 40}, {"neurons": [0, 48]}, {"neurons": [0.5, 40]}),
            *({"kv_groups": [0, 4]}, {"kv_groups": ["0", 3]}, {"heads": [1]}),
        ],
        ids=str,
    )
    def test_a_search_space_that_does_not_fit(self, folder, field):
        fields = {"layers": 3, "neurons": [0, tiny.NEURONS], "kv_groups": [0, tiny.KV_GROUPS], **field}
        change_json(folder / METADATA_FILE, search_space=fields)
        refusal(folder)

    def test_version(self, folder):
        change_json(folder / METADATA_FILE, version=2)
        message = (
            "has version 2; this flextron reads 1. Install the flextron that wrote it, or rank the original again."
        )
        assert message in refusal(folder)

    def test_no_search_space(self, folder):
        change_json(folder / METADATA_FILE, search_space=None)
        assert len(ElasticModel.from_pretrained(folder).search_space.neurons) > len(SPACE.neurons)

    def test_what_lies_beside_a_gguf_file_is_not_its_own(self, folder, plain_llama, monkeypatch):
        """An exported sub-network may lie in the folder of the elastic model that it came from."""
        (folder / "narrow.gguf").write_bytes(b"")
        loaded = copy.deepcopy(plain_llama), {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": ()}
        monkeypatch.setattr(source, "check_gguf", lambda _: None)
        monkeypatch.setattr(checkpoint, "complete_config", lambda _: plain_llama.config)
        monkeypatch.setattr(checkpoint, "check_all_used", lambda *_: None)
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded)
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: None)
        model = ElasticModel.from_pretrained(folder / "narrow.gguf")
        assert model.ranking is None
        assert model.search_space != SPACE

    def test_ranking_truncated(self, folder):
        cut(folder / RANKING_FILE, 200)
        refusal(folder)

    @pytest.mark.parametrize(
        "changes",
        [{"neurons": None}, {"neurons": torch.zeros(3, 8)}, {"version": "2"}, {"tokens": "many"}],
        ids=["absent", "shape", "version", "tokens"],
    )
    def test_ranking_of_another_kind(self, folder, changes):
        tensors = load_file(folder / RANKING_FILE)
        record = {"version": "1", "score": "rms", "tokens": "9", "text": "t"}
        for name, value in changes.items():
            (tensors if name in tensors else record)[name] = value
        tensors = {name: value for name, value in tensors.items() if value is not None}
        save_file(tensors, folder / RANKING_FILE, metadata=record)
        refusal(folder)
