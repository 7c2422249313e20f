"""GGUF export: the file's contents, llama.cpp's results, and errors before anything is written."""

import copy
import shutil
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import tiny
from flextron import cli, export_gguf
from flextron.costs.latency import measure_latency
from flextron.costs.saved import LLAMA_CPP, find_table, save_table
from flextron.costs.table import CostTable
from flextron.demo.quickstart import smollm2_path
from flextron.errors import CheckpointError, ExportError
from flextron.exporting.gguf import comparing, dialects
from flextron.exporting.gguf import file as gguf_file
from flextron.exporting.gguf.quantization import SCHEMES
from flextron.exporting.gguf.timing import in_llamacpp
from flextron.model import ElasticModel
from flextron.subnet import Subnet

SIZES = {"vocab_size": 300, "max_position_embeddings": 128}
OWN_SIZES = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": None},
    "qwen3": {"attention_bias": False},
}


def elastic(model_type, **changes):
    sizes = {**SIZES, **OWN_SIZES.get(model_type, {}), **changes}
    return ElasticModel(tiny.plain_model(model_type, **sizes), tiny.tokenizer())


def wide(model_type="llama", hidden_size=96, intermediate_size=96, **changes):
    """A model whose rows fit quantisation."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "attention_bias": False}
    return elastic(model_type, **sizes, mlp_bias=False, **changes)


def widths(neurons, kv_groups):
    return Subnet((neurons,) * 3, (kv_groups,) * 3)


ROTATION = {"rope_theta": 500.0, "factor": 8.0}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
UNEVEN = Subnet((24, 40, 16), (3, 1, 2))
CASES = {
    "llama": ("llama", widths(24, 2), "llama", {}),
    "llama full": ("llama", widths(40, 3), "llama", {}),
    "llama tied": ("llama", widths(24, 2), "llama", {"tie_word_embeddings": True}),
    "llama per layer": ("llama", UNEVEN, "deci", {}),
    "llama per layer, tied": ("llama", UNEVEN, "deci", {"tie_word_embeddings": True}),
    "llama 3 rotation": ("llama", UNEVEN, "deci", {"rope_parameters": {**ROTATION, **LLAMA3}}),
    "linear rotation": ("llama", widths(24, 2), "llama", {"rope_parameters": {**ROTATION, "rope_type": "linear"}}),
    "no attention first": ("llama", Subnet((24, 40, 16), (0, 1, 2)), "deci", {}),
    "no attention last": ("llama", Subnet((24, 40, 16), (1, 1, 0)), "deci", {}),
    "no MLP first": ("llama", Subnet((0, 40, 16), (1, 1, 2)), "deci", {}),
    "no MLP between": ("llama", Subnet((16, 0, 16), (1, 1, 2)), "deci", {}),
    "no MLP last": ("llama", Subnet((24, 40, 0), (1, 1, 2)), "deci", {}),
    "no layer": ("llama", Subnet((24, 0, 16), (1, 0, 2)), "deci", {}),
    "no first layer": ("llama", Subnet((0, 24, 16), (0, 2, 2)), "deci", {}),
    "no last layer": ("llama", Subnet((24, 40, 0), (1, 1, 0)), "deci", {}),
    "no attention at all": ("llama", widths(24, 0), "deci", {}),
    "no MLP at all": ("llama", widths(0, 2), "deci", {}),
    "mistral": ("mistral", widths(24, 2), "llama", {}),
    "mistral per layer": ("mistral", UNEVEN, "deci", {}),
    "qwen2": ("qwen2", widths(24, 3), "qwen2", {}),
    "qwen2, fewer heads": ("qwen2", widths(24, 2), "deci", {}),
    "qwen2 per layer": ("qwen2", UNEVEN, "deci", {}),
    "qwen3": ("qwen3", widths(24, 2), "qwen3", {}),
    "gpt2": ("gpt2", widths(24, 6), "gpt2", {}),
}


@dataclass
class Written:
    model: ElasticModel
    subnet: Subnet
    arch: str
    reader: GGUFReader
    report: gguf_file.GgufReport

    def field(self, name):
        name = name if "." in name else f"{self.arch}.{name.replace('/', '.')}"
        return self.reader.fields[name].contents()

    @property
    def tensors(self):
        return {tensor.name: tensor for tensor in self.reader.tensors}


@pytest.fixture(scope="module", params=sorted(CASES))
def written(request, tmp_path_factory):
    model_type, subnet, arch, changes = CASES[request.param]
    model = elastic(model_type, **changes)
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    report = export_gguf(model, subnet, file, quantize="f32", verify=False)
    return Written(model, subnet, arch, GGUFReader(file), report)


class TestEveryFamily:
    def test_states_the_sizes(self, written):
        assert written.field("general.architecture") == written.report.architecture == written.arch
        assert written.field("block_count") == 3
        assert written.field("context_length") == 128
        neurons, heads = written.field("feed_forward_length"), written.field("attention/head_count")
        if written.arch != "deci":
            assert neurons == written.subnet.neurons[0]
            assert heads == written.subnet.kv_groups[0] * written.model.layers[0].attention.heads_per_unit
            return
        assert all(there == asked or asked == 0 for there, asked in zip(neurons, written.subnet.neurons, strict=True))
        groups = written.field("attention/head_count_kv")
        assert groups[1:] == list(written.subnet.kv_groups)[1:]
        assert heads[1:] == [2 * kept for kept in written.subnet.kv_groups][1:]

    def test_holds_the_kept_units(self, written):
        lm = written.model.lm
        tensors = written.tensors
        embeddings = lm.get_input_embeddings().weight.detach().numpy()
        assert np.array_equal(tensors["token_embd.weight"].data, embeddings)
        assert ("output.weight" in tensors) is not lm.config.tie_word_embeddings
        for index, (neurons, layer) in enumerate(zip(written.subnet.neurons, written.model.layers, strict=True)):
            if neurons:
                kept = layer.mlp.closes.matrix()[:, :neurons].detach().numpy()
                assert np.array_equal(tensors[f"blk.{index}.ffn_down.weight"].data, kept)
            elif f"blk.{index}.ffn_down.weight" in tensors:
                assert not tensors[f"blk.{index}.ffn_down.weight"].data.any()

    def test_reports_what_it_holds(self, written):
        held = sum(int(tensor.n_elements) for tensor in written.reader.tensors)
        assert written.report.parameters_got == held
        padded = [note for note in written.report.notes if "zeros" in note]
        if not padded and 0 not in (*written.subnet.neurons, *written.subnet.kv_groups):
            rotation = written.tensors.get("rope_freqs.weight")
            assert held - (0 if rotation is None else rotation.n_elements) == written.report.parameters_asked
        assert written.report.check is None
        assert "not verified" in str(written.report)

    def test_brings_the_tokenizer(self, written):
        tokenizer = written.model.tokenizer
        tokens = written.field("tokenizer.ggml.tokens")
        assert len(tokens) == 300
        assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        assert written.field("tokenizer.ggml.pre") == "gpt-2"
        assert written.field("tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
        assert not written.field("tokenizer.ggml.add_bos_token")

    def test_llama_cpp_computes_the_same(self, written, tmp_path):
        pytest.importorskip("xllamacpp")
        check = export_gguf(written.model, written.subnet, tmp_path / "small.gguf", quantize="f32").check
        assert check.agreement == 1
        assert check.positions == comparing.POSITIONS
        assert check.greedy_tokens == check.greedy_written > 0
        assert check.largest_difference < (5e-3 if written.arch == "gpt2" else 1e-4)  # ggml tabulates GELU in fp16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sources_of_16_bits(dtype, tmp_path):
    pytest.importorskip("xllamacpp")
    model = elastic("llama")
    model.lm.to(dtype)
    report = export_gguf(model, UNEVEN, tmp_path / "small.gguf", quantize="f16")
    assert report.check.agreement > 0.9


@pytest.mark.parametrize("quantize", sorted(SCHEMES))
def test_every_quantisation(quantize, tmp_path):
    pytest.importorskip("xllamacpp")
    model = wide(hidden_size=768, intermediate_size=512, head_dim=128)
    with torch.no_grad():  # sized as in a trained model; otherwise rounding grows from layer to layer
        for projection in model.lm.model.layers.parameters():
            projection *= 0.25 if projection.ndim == 2 else 1
    model.search_space = model.search_space.of_model(layers=3, neurons=512, kv_groups=3, neuron_step=256)
    subnet = Subnet((256, 512, 256), (2, 3, 2))
    report = export_gguf(model, subnet, tmp_path / "small.gguf", quantize=quantize)
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "small.gguf").tensors}
    stored = tensors["blk.0.ffn_up.weight"]
    assert stored.tensor_type.name == SCHEMES[quantize].most
    exact = model.layers[0].mlp.opens[1].weight[:256].detach().numpy()
    error = np.abs(dequantize(stored.data, stored.tensor_type) - exact).max() / np.abs(exact).max()
    bits = {"F": 1e-3, "B": 1e-2}.get(SCHEMES[quantize].most[0]) or 2.0 ** (1 - int(SCHEMES[quantize].most[1]))
    assert error < bits
    assert report.check.agreement >= 0.5


def test_k_quants_fall_back_as_llama_cpp_does_and_say_so(tmp_path):
    pytest.importorskip("xllamacpp")
    model = wide(intermediate_size=512)
    report = export_gguf(model, widths(512, 3), tmp_path / "small.gguf", quantize="q4_k_m")
    assert "blocks of 256 do not divide the rows of" in report.notes[0]
    assert "these are stored as Q5_0 or Q8_0" in report.notes[0]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "small.gguf").tensors}
    wanted = {
        "blk.0.ffn_up": "Q5_0",
        "blk.0.ffn_down": "Q4_K",
        "blk.2.ffn_down": "Q6_K",
        "token_embd": "Q5_0",
        "output": "Q8_0",
        "blk.0.attn_norm": "F32",
    }
    assert {name: kinds[f"{name}.weight"] for name in wanted} == wanted


class TestRefused:
    @pytest.mark.parametrize(
        ("model_type", "subnet", "quantize", "reason"),
        [
            ("gemma2", widths(40, 3), "f16", r"gemma2 has no GGUF export.*--to hf.*convert_hf_to_gguf"),
            ("qwen3", UNEVEN, "f16", r"qwen3 architecture needs equal widths above 0.*--equal-widths"),
            ("gpt2", Subnet((24, 40, 16), (6, 6, 6)), "f16", r"gpt2 architecture needs equal widths.*--equal-widths"),
            ("gpt2", widths(24, 0), "f16", r"gpt2 architecture needs equal widths above 0"),
            ("gpt2", widths(24, 2), "f16", r"2 of 6 attention heads, but gpt2 cannot express that"),
            ("llama", widths(24, 2), "q3", r"unknown quantisation 'q3'; choose one of f32"),
            ("llama", widths(24, 2), "q8_0", r"rows of 48 numbers, which Q8_0's blocks of 32 do not divide"),
        ],
    )
    def test_with_the_reason_and_a_way_out(self, model_type, subnet, quantize, reason, tmp_path):
        with pytest.raises(ExportError, match=reason):
            export_gguf(elastic(model_type), subnet, tmp_path / "small.gguf", quantize=quantize)
        assert not list(tmp_path.iterdir())

    def test_rows_that_do_not_fit_name_the_nearest_widths(self, tmp_path):
        model = wide()
        model.search_space = model.search_space.of_model(layers=3, neurons=96, kv_groups=3, neuron_step=8)
        with pytest.raises(ExportError, match=r"ffn_down.weight has rows of 72 .* nearest that fit are 64 and 96"):
            export_gguf(model, widths(72, 3), tmp_path / "small.gguf", quantize="q8_0")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("model_type", "changes", "feature"),
        [
            ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
            ("qwen3", {"attention_bias": True}, "attention_bias"),
            ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention scores"),
            (
                "qwen3",
                {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
                "rope_type=linear",
            ),
            (
                "llama",
                {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
                "rope_type=yarn",
            ),
        ],
    )
    def test_features_that_llama_cpp_leaves_out(self, model_type, changes, feature, tmp_path):
        model = elastic(model_type, **changes)
        with pytest.raises(ExportError, match=f"does not compute {feature}"):
            export_gguf(model, model.search_space.full, tmp_path / "small.gguf")

    def test_no_tokenizer(self, tmp_path):
        model = elastic("llama")
        model.tokenizer = None
        with pytest.raises(ExportError, match="needs a tokenizer"):
            export_gguf(model, UNEVEN, tmp_path / "small.gguf")

    @pytest.mark.parametrize(
        ("core", "split", "reason"),
        [
            (models.WordLevel({"a": 0}, "a"), pre_tokenizers.Whitespace(), "a byte-level BPE .* of the type WordLevel"),
            (models.BPE({"a": 0}, []), pre_tokenizers.Whitespace(), "text by 'Whitespace', which matches none of"),
        ],
    )
    def test_other_tokenizers(self, core, split, reason, tmp_path):
        model = elastic("llama")
        tokenizer = Tokenizer(core)
        tokenizer.pre_tokenizer = split
        model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        with pytest.raises(ExportError, match=reason):
            export_gguf(model, UNEVEN, tmp_path / "small.gguf")
        assert not list(tmp_path.iterdir())

    def test_a_tokenizer_in_python(self, tmp_path):
        model = elastic("llama")
        model.tokenizer = ByT5Tokenizer()
        with pytest.raises(ExportError, match="needs a byte-level BPE tokenizer; this one is a ByT5Tokenizer"):
            export_gguf(model, UNEVEN, tmp_path / "small.gguf")

    def test_what_is_there_stays_unless_told_otherwise(self, tmp_path):
        model, file = elastic("llama"), tmp_path / "small.gguf"
        file.write_text("mine")
        with pytest.raises(CheckpointError, match="exists"):
            export_gguf(model, UNEVEN, file)
        with pytest.raises(CheckpointError, match="not a GGUF file"):
            export_gguf(model, UNEVEN, file, overwrite=True)
        assert file.read_text() == "mine"
        file.unlink()
        for overwrite in (False, True):
            export_gguf(model, UNEVEN, file, overwrite=overwrite, verify=False)
        assert list(tmp_path.iterdir()) == [file]
        with pytest.raises(CheckpointError, match="is a folder"):
            export_gguf(model, UNEVEN, tmp_path, overwrite=True)

    def test_a_write_that_fails_leaves_nothing(self, tmp_path):
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        try:
            with pytest.raises(CheckpointError, match="cannot write"):
                export_gguf(elastic("llama"), UNEVEN, tmp_path / "small.gguf")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(tmp_path.iterdir())

    def test_no_space(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gguf_file, "bytes_of", lambda tensor, kind: 10**15)
        with pytest.raises(CheckpointError, match=r"no space for .*small\.gguf: it needs about"):
            export_gguf(elastic("llama"), UNEVEN, tmp_path / "small.gguf")
        assert not list(tmp_path.iterdir())

    def test_without_the_package_gguf(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
        with pytest.raises(ExportError, match=r'pip install "flextron\[gguf\]"'):
            export_gguf(elastic("llama"), UNEVEN, tmp_path / "small.gguf")

    def test_a_wrong_file_never_appears(self, tmp_path, monkeypatch):
        pytest.importorskip("xllamacpp")
        monkeypatch.setattr(dialects, "DECI", dialects.Dialect("deci", pairs_neighbours=False))
        with pytest.raises(ExportError, match="computes something else"):
            export_gguf(elastic("llama"), UNEVEN, tmp_path / "small.gguf")
        assert not list(tmp_path.iterdir())

    def test_too_few_bits_name_the_way_out(self, tmp_path, monkeypatch):
        """An untrained sub-network in few bits may predict other tokens, and nothing is wrong with the export."""
        pytest.importorskip("xllamacpp")
        monkeypatch.setattr(comparing, "_LEAST_AGREEMENT", 1.01)
        with pytest.raises(ExportError, match=r"Q8_0 loses too much of this sub-network.*Take a finer type"):
            export_gguf(wide(), wide().search_space.full, tmp_path / "small.gguf", quantize="q8_0")
        assert not list(tmp_path.iterdir())


def test_other_splits_have_their_names(tmp_path):
    model = wide()
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    qwen2 = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for name, split in {"smollm": digits, "qwen2": qwen2}.items():
        tokenizer = Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())
        tokenizer.pre_tokenizer = split
        model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")  # noqa: S106
        export_gguf(model, widths(96, 3), tmp_path / f"{name}.gguf")
        assert GGUFReader(tmp_path / f"{name}.gguf").fields["tokenizer.ggml.pre"].contents() == name


def test_where_llama_cpp_is_missing_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "is_installed", lambda: False)
    report = export_gguf(elastic("llama"), UNEVEN, tmp_path / "small.gguf")
    assert "not verified" in str(report)
    assert 'pip install "flextron[llamacpp]"' in str(report)


def test_a_sliding_window_limits_the_context(tmp_path):
    report = export_gguf(elastic("mistral", sliding_window=50), UNEVEN, tmp_path / "small.gguf", verify=False)
    assert "contexts have at most 50 tokens" in report.notes[0]
    assert GGUFReader(tmp_path / "small.gguf").fields["deci.context_length"].contents() == 50


class TestCommand:
    def run(self, capsys, *arguments):
        code = cli.main([*map(str, arguments)])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    def test_writes_a_file(self, checkpoint, tmp_path, capsys):
        file = tmp_path / "small.gguf"
        code, shown = self.run(capsys, "export", checkpoint, file, "--subnet", "neurons=24", "--to", "gguf")
        assert code == 0, shown
        assert f"wrote {file}: llama, f16, 3 layers of 24 neurons" in shown
        assert GGUFReader(file).fields["llama.feed_forward_length"].contents() == 24
        code, shown = self.run(capsys, "export", checkpoint, file, "--to", "gguf")
        assert code == 2
        assert "exists" in shown

    def test_equal_widths_of_at_most_the_parameters(self, checkpoint, tmp_path, capsys):
        subnet = tmp_path / "subnet.json"
        subnet.write_text(UNEVEN.to_json())
        arguments = ["export", checkpoint, tmp_path / "small.gguf", "--subnet", subnet, "--equal-widths"]
        code, shown = self.run(capsys, *arguments, "--to", "gguf", "--no-verify")
        assert code == 0, shown
        assert ": llama, f16" in shown
        model = ElasticModel.from_pretrained(checkpoint)
        share = float(shown.split("%")[0].split()[-1]) / 100
        assert model.share(UNEVEN) - 0.2 < share <= model.share(UNEVEN)

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["out.bin", "--to", "gguf"], "its name must end in .gguf"),
            (["out.gguf", "--to", "gguf", "--remote-code"], "--remote-code needs --to hf"),
            (["out", "--quantize", "q8_0"], "--quantize q8_0 needs --to gguf"),
            (["out", "--neuron-step", "256"], "--neuron-step 256 needs --budget"),
            (["out", "--to", "vllm"], "vllm"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, checkpoint, arguments, reason, tmp_path, capsys):
        out, *options = arguments
        try:
            code, shown = self.run(capsys, "export", checkpoint, tmp_path / out, *options)
        except SystemExit as stopped:
            code, shown = stopped.code, "".join(capsys.readouterr())
        assert code == 2
        assert reason in " ".join(shown.translate({ord(line): " " for line in "│┃"}).split())
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A checkpoint large enough that widths change its time, with a table of this process."""
    folder = tmp_path_factory.mktemp("deep") / "elastic"
    model = elastic("llama", intermediate_size=64)
    model.save_pretrained(folder)
    save_table(folder, measure_latency(model, tokens=8, designs=8, held_out=0, rounds=1))
    return folder


class TestTimes:
    def test_tables_of_two_quantisations_are_two_files(self, timed, tmp_path):
        (file,) = (timed / "latency").glob("*.json")
        table = CostTable.load(file)
        files = {
            save_table(tmp_path, replace(table, conditions={"engine": LLAMA_CPP, "quantization": kind}))
            for kind in ("f16", "q8_0")
        }
        assert len(files) == 2

    @pytest.mark.parametrize("wanted", ["f16", "q8_0", "q4_k_m"])
    def test_the_table_of_the_same_weights_is_preferred(self, timed, tmp_path, wanted):
        folder = shutil.copytree(timed, tmp_path / "elastic")
        (file,) = (folder / "latency").glob("*.json")
        table = CostTable.load(file)
        for kind in ("f16", "q8_0"):
            save_table(folder, replace(table, conditions={"engine": LLAMA_CPP, "quantization": kind}))
        model = ElasticModel.from_pretrained(folder)
        warnings: list[str] = []
        found = find_table(model, folder, "tpot", engine=LLAMA_CPP, quantization=wanted, warn=warnings.append)
        if wanted == "q4_k_m":
            assert "was measured with weights in f16, not in q4_k_m" in warnings[0]
        else:
            assert (found.conditions["quantization"], warnings) == (wanted, [])

    def test_a_csv_of_llamacpp_is_a_table_of_llama_cpp(self, timed, tmp_path):
        folder = shutil.copytree(timed, tmp_path / "elastic")
        model = ElasticModel.from_pretrained(folder)
        space = model.search_space
        rows = product((0, space.neurons[len(space.neurons) // 2], space.neurons[-1]), space.kv_groups)
        file = tmp_path / "times.csv"
        file.write_text("neurons,kv_groups,ms\n" + "".join(f"{n},{g},{1 + n / 8 + g}\n" for n, g in rows))
        arguments = ["measure-latency", str(folder), "--from-csv", str(file), "--phase", "decode"]
        assert cli.main([*arguments, "--engine", "llamacpp"]) == 0
        warnings = []
        assert (
            find_table(model, folder, "tpot", engine=LLAMA_CPP, warn=warnings.append).conditions["engine"] == LLAMA_CPP
        )
        assert not warnings
        assert find_table(model, folder, "tpot").conditions["engine"] == "flextron decoder"

    @pytest.mark.parametrize("family", ["qwen3", "gpt2"])
    def test_families_of_one_width_for_all_layers_are_refused_at_once(self, family):
        with (
            pytest.raises(ExportError, match=f"needs one width for all layers of {family}.*--from-csv"),
            in_llamacpp(elastic(family), phase="decode", tokens=8),
        ):
            pass

    def test_tables_of_llama_cpp_stand_beside_those_of_this_process(self, timed, tmp_path, capsys):
        pytest.importorskip("xllamacpp")
        folder = shutil.copytree(timed, tmp_path / "elastic")
        model = ElasticModel.from_pretrained(folder)
        warnings = []
        find_table(model, folder, "tpot", engine=LLAMA_CPP, warn=warnings.append)
        assert "was measured in flextron decoder, not in llama.cpp" in warnings.pop()
        options = ["--engine", "llamacpp", "--tokens", "16", "--rounds", "1"]
        assert cli.main(["measure-latency", str(folder), *options]) == 0, capsys.readouterr().err
        assert "llama.cpp (xllamacpp" in capsys.readouterr().out
        there = find_table(model, folder, "tpot", engine=LLAMA_CPP, warn=warnings.append)
        about = {"phase": "decode", "quantization": "f16", "batch": 1, "context_tokens": 16, "held_out": 8}
        assert about.items() <= dict(there.conditions).items()
        assert there.full > there.smallest >= 0
        assert find_table(model, folder, "tpot").conditions["engine"] == "flextron decoder"
        assert (
            find_table(model, folder, "ttft", engine=LLAMA_CPP, warn=warnings.append).conditions["prompt_tokens"] == 16
        )
        assert not warnings

    def test_a_text_too_long_for_the_file_is_refused(self, timed, capsys):
        assert cli.main(["measure-latency", str(timed), "--engine", "llamacpp", "--tokens", "125"]) == 2
        assert "125 + 8 tokens: this model has only 128 positions" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (["--engine", "llamacpp", "--batch", "2"], "--batch is 2; --engine llamacpp times one sequence"),
            (["--quantize", "q8_0"], "--quantize q8_0 needs --engine llamacpp"),
        ],
    )
    def test_options_that_do_not_go_together(self, options, reason, timed, capsys):
        with pytest.raises(SystemExit):
            cli.main(["measure-latency", str(timed), *options])
        assert reason in " ".join("".join(capsys.readouterr()).translate({ord(line): " " for line in "│┃"}).split())


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(("quantize", "least"), [("f32", 1.0), ("f16", 0.99)])
def test_smollm2_in_llama_cpp(quantize, least, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(comparing, "POSITIONS", 512)
    model = ElasticModel.from_pretrained(smollm2_path(), dtype=torch.float32)
    subnet = Subnet((1536, 1344, 1152, *(1536, 1408) * 13, 0), (3,) * 10 + (2, 3) * 9 + (0, 3))
    check = export_gguf(model, subnet, tmp_path / "small.gguf", quantize=quantize).check
    assert check.positions == 512
    assert check.agreement >= least
    assert check.greedy_tokens == check.greedy_written


def test_several_chat_templates_are_all_written(tmp_path):
    model = elastic("llama")
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    export_gguf(model, model.search_space.full, tmp_path / "x.gguf", quantize="f32", verify=False)
    fields = GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
