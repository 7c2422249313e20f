"""Weights in few bits in files: what is loaded computes what was saved, and no second copy in float is held."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from flextron import ElasticModel
from flextron import model as public
from flextron.cli import main
from flextron.elastic import quantized_files
from flextron.elastic.quantized import quantize
from flextron.elastic.source import QUANTIZED_FILE
from flextron.errors import CheckpointError
from flextron.subnet import Subnet
from flextron.training.sampling import even_sensitivity

TYPES = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi")
BITS = ("int8", "int4")


def logits(model, subnet=None):
    with torch.inference_mode(), model.use(subnet or model.search_space.full):
        return tiny.logits_of(model, tiny.token_ids(2, 9))


def saved(folder, model_type="llama", **changes):
    """A float checkpoint in a folder."""
    lm = tiny.plain_model(model_type, vocab_size=303, **changes)
    ElasticModel(lm, tiny.tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=BITS)
def folders(request, tmp_path_factory):
    """A float checkpoint, and a quantised one that was made of it."""
    home = tmp_path_factory.mktemp(request.param)
    saved(home / "float")
    ElasticModel.from_pretrained(home / "float", dtype=request.param).save_pretrained(home / request.param)
    return home / "float", home / request.param


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("model_type", TYPES)
def test_it_computes_what_was_saved(model_type, bits, tied, tmp_path):
    saved(tmp_path / "float", model_type, tie_word_embeddings=tied)
    before = ElasticModel.from_pretrained(tmp_path / "float", dtype="float32")
    fingerprint = before.fingerprint()
    quantize(before, bits)
    before.save_pretrained(tmp_path / "few")
    after = ElasticModel.from_pretrained(tmp_path / "few")
    space = before.search_space
    for subnet in (space.full, Subnet((0, 40, 6), (space.kv_groups[-1], 0, 1)), space.smallest):
        assert torch.equal(logits(after, subnet), logits(before, subnet))
    assert (after.weights_type, after.fingerprint(), after.search_space) == (bits, fingerprint, space)
    assert after.tokenizer.decode(after.tokenizer("a b")["input_ids"]) == "a b"
    if bits == "int8" or model_type == "llama":
        assert file_size(tmp_path / "few") < 0.45 * file_size(tmp_path / "float")


def file_size(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "model_type", [name for name in TYPES if name != "gpt_neox"]
)  # whose files name a head otherwise
def test_one_weight_after_the_other_gives_what_all_at_once_give(model_type, bits, tmp_path, monkeypatch):
    saved(tmp_path / "float", model_type)
    whole = ElasticModel.from_pretrained(tmp_path / "float")
    quantize(whole, bits)
    monkeypatch.setattr(public, "quantize", None)
    lean = ElasticModel.from_pretrained(tmp_path / "float", dtype=bits)
    assert torch.equal(logits(lean), logits(whole))
    assert lean.fingerprint() == whole.fingerprint()


def test_other_names_in_the_files_are_read_whole(tmp_path):
    """Such as a model of which the files hold a head that the config says is the embedding."""
    saved(tmp_path / "float", tie_word_embeddings=True)
    file = tmp_path / "float" / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.randn(303, tiny.HIDDEN)}, file, metadata={"format": "pt"})
    assert quantized_files.quantize_while_loading(tmp_path / "float", "int8", ElasticModel) is None
    whole = ElasticModel.from_pretrained(tmp_path / "float")
    quantize(whole, "int8")
    assert torch.equal(logits(ElasticModel.from_pretrained(tmp_path / "float", dtype="int8")), logits(whole))


def _config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


FAULTS = {
    "unknown type": lambda folder: _config(folder, model_type="nonsense"),
    "remote code": lambda folder: _config(folder, model_type="nonsense", auto_map={"AutoConfig": "x.Y"}),
    "other sizes": lambda folder: _config(folder, intermediate_size=72),
    "cut off": _cut,
    "of another kind": lambda folder: _config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_as_for_floats(fault, tmp_path):
    FAULTS[fault](saved(tmp_path / "float"))
    told = []
    for dtype in ("float32", "int8"):
        with pytest.raises(CheckpointError) as error:
            ElasticModel.from_pretrained(tmp_path / "float", dtype=dtype)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_files_that_are_no_weights_of_the_model_do_not_matter(tmp_path):
    """Some repositories hold the weights a second time, in the names of another library."""
    saved(tmp_path / "float")
    save_file({"layers.0.w1": torch.zeros(3)}, tmp_path / "float" / "consolidated.safetensors")
    assert ElasticModel.from_pretrained(tmp_path / "float", dtype="int8").weights_type == "int8"


class TestDamage:
    @pytest.fixture
    def folder(self, folders, tmp_path):
        return shutil.copytree(folders[1], tmp_path / "few")

    def change(self, folder, **tensors):
        weights = load_file(folder / QUANTIZED_FILE)
        for name, value in tensors.items():
            weights.pop(name) if value is None else weights.update({name: value})
        save_file(weights, folder / QUANTIZED_FILE)

    NAME = "model.layers.1.mlp.down_proj"

    @pytest.mark.parametrize(
        ("part", "value", "message"),
        [
            ("weight", None, "is incomplete: it lacks"),
            ("scale", None, "is incomplete: it lacks"),
            ("weight", torch.zeros(3, 3, dtype=torch.int8), "is damaged: .*it is"),
            ("scale", torch.zeros(5), "is damaged: .*it is"),
            ("more", torch.zeros(5), "has no place"),
        ],
    )
    def test_of_a_projection(self, folder, part, value, message):
        self.change(folder, **{f"{self.NAME}.{part}": value})
        with pytest.raises(CheckpointError, match=message):
            ElasticModel.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
    def test_of_embeddings(self, folder, name):
        scale = load_file(folder / QUANTIZED_FILE)[f"{name}.scale"]
        scale[3] = torch.nan
        self.change(folder, **{f"{name}.scale": scale})
        with pytest.raises(CheckpointError, match=f"{name}: it has values that are no numbers"):
            ElasticModel.from_pretrained(folder)
        self.change(folder, **{f"{name}.scale": None, f"{name}.weight": None})
        with pytest.raises(CheckpointError, match=f"it lacks '{name}.weight'"):
            ElasticModel.from_pretrained(folder)

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
    def test_of_a_scale_of_embeddings(self, name, tied, tmp_path):
        saved(tmp_path / "float", tie_word_embeddings=tied)
        ElasticModel.from_pretrained(tmp_path / "float", dtype="int8").save_pretrained(tmp_path / "few")
        self.change(tmp_path / "few", **{f"{name}.scale": None})
        with pytest.raises(CheckpointError, match=f"it lacks '{name}.scale'" if tied else f"is damaged: {name}.weight"):
            ElasticModel.from_pretrained(tmp_path / "few")

    def test_of_a_norm(self, folder):
        self.change(folder, **{"model.norm.weight": torch.full((tiny.HIDDEN,), torch.inf)})
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight: it is of another size or type, or has values"):
            ElasticModel.from_pretrained(folder)

    def test_of_flextron_json(self, folder):
        file = folder / "flextron.json"
        record = json.loads(file.read_text())
        file.write_text(json.dumps({**record, "quantization": "int3"}))
        with pytest.raises(CheckpointError, match="holds int3 weights; this flextron reads int8, int4"):
            ElasticModel.from_pretrained(folder)

    @pytest.mark.parametrize("file", ["tokenizer.json", QUANTIZED_FILE])
    def test_that_other_libraries_find(self, folder, file):
        (folder / file).write_text("{")
        with pytest.raises(CheckpointError, match="cannot load"):
            ElasticModel.from_pretrained(folder)

    def test_a_file_that_is_missing(self, folder):
        (folder / QUANTIZED_FILE).unlink()
        with pytest.raises(CheckpointError, match=f"lacks {QUANTIZED_FILE}"):
            ElasticModel.from_pretrained(folder)


def test_nothing_takes_the_bits_for_numbers(folders):
    """transformers would load them as they are, without their scales."""
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(folders[1])


def test_it_loads_in_its_own_type_only(folders):
    _, few = folders
    held = ElasticModel.from_pretrained(few).weights_type
    assert ElasticModel.from_pretrained(few, dtype=held).weights_type == held
    for other in ("float32", *set(BITS) - {held}):
        with pytest.raises(CheckpointError, match=f"holds {held} weights, which load as {held} or auto only"):
            ElasticModel.from_pretrained(few, dtype=other)
    with pytest.raises(CheckpointError, match="which load without options such as search_space"):
        ElasticModel.from_pretrained(few, search_space=None)


def test_on_the_hub_it_is_told_how_to_get_it(folders, tmp_path):
    """Of a repository in the hub's cache."""
    repository = tmp_path / "models--org--few"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folders[1], repository / "snapshots" / ("0" * 40))
    with pytest.raises(CheckpointError, match="hf download org/few --local-dir FOLDER"):
        ElasticModel.from_pretrained("org/few", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_training_refuses_it(folders, dry, tmp_path, capsys):
    assert main(["train", str(folders[1]), str(tmp_path / "out"), "--device", "cpu", *dry]) == 2
    assert "for running only" in capsys.readouterr().err


@pytest.mark.parametrize("bits", BITS)
def test_the_verb_keeps_what_was_measured(bits, tmp_path, capsys):
    folder = saved(tmp_path / "float")
    shutil.copytree(folder, tmp_path / "copy")
    model = ElasticModel.from_pretrained(folder)
    even_sensitivity(model).save(folder)
    for name in ("latency/tpot.json", "routers/pairs-1.jsonl", "metrics.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    out = tmp_path / "few"
    assert main(["quantize", str(folder), str(out), "--dtype", bits, "--tokens", "512"]) == 0
    printed = capsys.readouterr().out
    assert f"of {bits} weights" in printed
    assert f"| share of the layers' weights | float32, nats/token | {bits} | difference |" in printed
    for name in ("latency/tpot.json", "routers/pairs-1.jsonl", "sensitivity.json"):
        assert (out / name).read_text() == (folder / name).read_text()
    assert not (out / "metrics.jsonl").exists()
    assert ElasticModel.from_pretrained(out).weights_type == bits
    assert main(["quantize", str(folder), str(out), "--dtype", bits]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "copy"), str(out), "--dtype", bits, "--overwrite", "--tokens", "0"]) == 0
    assert not (out / "routers").exists()
