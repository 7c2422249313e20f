"""Packs: base and pack make the trained model again; another base, damaged files and too small a size are refused."""

import json
from dataclasses import asdict

import pytest
import torch

import tiny
from flextron import cli
from flextron.elastic.adapters import adapters_from, merge_adapters, without_adapters
from flextron.elastic.model import projections_of
from flextron.elastic.pack import FILE, WEIGHTS, LowRank, Pack, find_pack, shipped_packs
from flextron.elastic.permutation import permute
from flextron.errors import CheckpointError, ExportError, FlextronError
from flextron.exporting.card import text_names
from flextron.exporting.pack import accuracy_table, make_pack, pack_card, save_pack
from flextron.model import ElasticModel
from flextron.routers.static.pairs import Pairs
from flextron.tasks.results import TaskResult, averages
from flextron.training.folder import training_of

RANK = 3


def base_model(model_type: str = "llama", **changes) -> ElasticModel:
    return ElasticModel(tiny.plain_model(model_type, vocab_size=300, **changes), tiny.tokenizer())


@torch.no_grad()
def trained_model(model_type: str = "llama") -> ElasticModel:
    """Ranked, then changed at rank 3 in every projection, and in every norm."""
    model = base_model(model_type)
    permute(model, tiny.ranking_for(model))
    draw = torch.Generator().manual_seed(1)
    for projection in projections_of(model).values():
        rows, columns = projection.matrix().shape
        change = torch.randn(rows, RANK, generator=draw) @ torch.randn(RANK, columns, generator=draw)
        projection.matrix().add_(change * 0.02)
    for name, parameter in model.lm.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.fixture
def blocks():
    return tiny.blocks(8, 32, vocab=300)


@pytest.fixture
def folders(tmp_path, blocks):
    """A base, a trained checkpoint with sensitivities and pairs, and its pack."""
    base_model().save_pretrained(tmp_path / "base")
    trained = trained_model()
    trained.save_pretrained(tmp_path / "trained")
    tiny.uneven_sensitivity(trained).save(tmp_path / "trained")
    about = {"fingerprint": trained.fingerprint(), "text": "a text"}
    Pairs.beside(tmp_path / "trained", about).add(trained.search_space.full, 1.25)
    trained.folder = tmp_path / "trained"
    base = ElasticModel.from_pretrained(tmp_path / "base", dtype="float32")
    pack = make_pack(trained, base, blocks, base_name=str(tmp_path / "base"))
    save_pack(pack, tmp_path / "pack", trained, pack_card(pack, "| losses |"))
    return tmp_path


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_base_and_pack_make_the_trained_model(model_type, blocks, tmp_path):
    """Of every size; for stacked, transposed and biased projections too."""
    trained, base = trained_model(model_type), base_model(model_type)
    make_pack(trained, base_model(model_type), blocks, base_name="base").save(tmp_path)
    pack = Pack.load(tmp_path)
    pack.apply(base)
    for subnet in (trained.search_space.full, trained.search_space.uniform(20, base.search_space.kv_groups[-1])):
        with trained.use(subnet), base.use(subnet):
            expected, found = (tiny.logits_of(model, blocks.tokens) for model in (trained, base))
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # 8 bits


def test_what_is_loaded(folders):
    model = ElasticModel.from_pretrained(folders / "base", pack=folders / "pack")
    trained = ElasticModel.from_pretrained(folders / "trained")
    assert (model.folder, model.search_space) == (folders / "pack", trained.search_space)
    assert model.fingerprint() == Pack.load(folders / "pack").fingerprint
    assert torch.equal(model.ranking.neurons, trained.ranking.neurons)
    alone = ElasticModel.from_pretrained(folders / "pack", dtype="bfloat16")  # with the base that it names
    assert (alone.dtype, alone.fingerprint()) == (torch.bfloat16, model.fingerprint())
    assert {buffer.dtype for buffer in alone.lm.buffers()} == {torch.float32}  # of the rotary angles


def test_pairs_belong_to_the_pack(folders):
    """So a router can be fitted to them without measuring again."""
    model = ElasticModel.from_pretrained(folders / "pack")
    pairs = Pairs.beside(folders / "pack", {"fingerprint": model.fingerprint(), "text": "a text"})
    assert pairs.measured() == {model.search_space.full: 1.25}


def test_another_base_is_refused_and_stays_as_it_was(folders):
    other = base_model(intermediate_size=24)
    other.save_pretrained(folders / "other")
    with pytest.raises(CheckpointError, match=r"made for .*base .*Load the pack's own base"):
        ElasticModel.from_pretrained(folders / "other", pack=folders / "pack")
    with pytest.raises(CheckpointError, match="It is ranked already"):
        ElasticModel.from_pretrained(folders / "trained", pack=folders / "pack")
    before = {name: parameter.clone() for name, parameter in other.lm.named_parameters()}
    with pytest.raises(CheckpointError):
        Pack.load(folders / "pack").apply(other)
    assert all(torch.equal(before[name], parameter) for name, parameter in other.lm.named_parameters())


def test_damage_is_named(folders):
    weights, record = folders / "pack" / WEIGHTS, folders / "pack" / FILE
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match="cannot read the pack"):
        Pack.load(folders / "pack")
    weights.write_bytes(good)
    read = json.loads(record.read_text())
    for change, problem in (
        ({"dtype": 3}, "dtype is 3, not text"),
        ({"ranking": {}}, "ranking lacks"),
        ({"about": []}, "about is"),
    ):
        record.write_text(json.dumps({**read, **change}))
        with pytest.raises(CheckpointError, match=f"cannot read the pack .*{problem}"):
            Pack.load(folders / "pack")
    record.write_text(json.dumps({**read, "version": 9}))
    with pytest.raises(CheckpointError, match="it has version 9; this flextron reads 1"):
        ElasticModel.from_pretrained(folders / "pack")


def test_names_of_packs(folders):
    assert find_pack(folders / "pack") == folders / "pack"
    with pytest.raises(CheckpointError, match="no pack nothing"):
        find_pack("nothing")
    assert all(find_pack(name) == place for name, place in shipped_packs().items())


def test_a_small_pack_keeps_what_matters_most(blocks):
    """Half of the bytes lose something, and less than no change at all."""
    trained, errors = trained_model(), []
    expected = tiny.logits_of(trained, blocks.tokens)
    for most in (10_000_000, 9_000, 4_000):
        base = base_model()
        pack = make_pack(trained, base, blocks, base_name="base", max_bytes=most)
        assert sum(change.a.nbytes + change.b.nbytes + change.scales.nbytes for change in pack.changes.values()) < most
        errors.append((tiny.logits_of(base, blocks.tokens) - expected).square().mean().item())
    assert errors == sorted(errors)
    assert errors[0] < errors[2] / 10


def test_what_cannot_be_packed(blocks):
    with pytest.raises(ExportError, match="no ranking"):
        make_pack(base_model(), base_model(), blocks, base_name="base")
    with pytest.raises(ExportError, match="not what the checkpoint was ranked from"):
        make_pack(trained_model(), trained_model(), blocks, base_name="base")


def test_eight_bits_round_each_part_by_its_own_scale():
    a, b = torch.tensor([[1.0, -0.5], [100.0, 3.0]]), torch.tensor([[2.0, 0.001], [-1.0, 0.002]])
    for part in (0, 1):
        exact = b[:, part : part + 1] @ a[part : part + 1]
        found = LowRank.of(a[part : part + 1], b[:, part : part + 1]).matrix()
        assert (found - exact).abs().max() < exact.abs().max() / 100


def test_accuracy_in_the_card(tmp_path):
    results = [
        TaskResult(run, task, 0, "acc", {"acc": scores}, tuple(f"{task}/{n}" for n in range(4)), 1.0, None, 0.25)
        for run, scores in (("full", (1.0, 1.0, 1.0, 0.0)), ("60%", (1.0, 0.0, 1.0, 0.0)))
        for task in ("piqa", "mmlu")
    ]
    rows = [
        {"run": own.run, "headline": asdict(own), "all": asdict(everything)}
        for own, everything in zip(averages(results, ["piqa"]), averages(results), strict=True)
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": rows, "conditions": {"limit": 4}}))
    table = accuracy_table(file)
    assert "| 60% | 25.0 ±" in table
    assert "| 50.0% ±" in table
    assert "with mmlu" in table
    file.write_text("{}")
    with pytest.raises(ExportError, match=r"cannot read .*Name a results.json"):
        accuracy_table(file)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_its_changes_become_adapters(model_type, blocks):
    """They compute the same at every size; without them the ranked base computes."""
    pytest.importorskip("peft")
    ranked = base_model(model_type)
    permute(ranked, tiny.ranking_for(ranked))
    model = base_model(model_type)
    pack = make_pack(trained_model(model_type), model, blocks, base_name="base", max_bytes=9_000)
    subnets = (model.search_space.full, tiny.random_subnet(model.search_space, 1))

    def logits_of(model):
        results = []
        for subnet in subnets:
            with model.use(subnet):
                results.append(tiny.logits_of(model, blocks.tokens))
        return results

    expected, of_base = logits_of(model), logits_of(ranked)
    adapters_from(model, pack.changes)
    ranks = {name.partition(".lora_")[0]: len(p) for name, p in model.lm.named_parameters() if "lora_A" in name}
    assert ranks == {name: len(change.scales) for name, change in pack.changes.items()}
    with without_adapters(model):
        kept_norms = logits_of(model)  # the pack's norms stay
    for found, wanted in zip(logits_of(model), expected, strict=True):
        tiny.assert_same_function(found, wanted)
    merge_adapters(model)
    for found, wanted in zip(logits_of(model), expected, strict=True):
        tiny.assert_same_function(found, wanted)
    for name, other in pack.others.items():
        dict(ranked.lm.named_parameters())[name].data.copy_(other)
    for found, wanted, before in zip(kept_norms, logits_of(ranked), of_base, strict=True):
        tiny.assert_same_function(found, wanted)
        assert tiny.differs(found, before)
    with pytest.raises(FlextronError, match="changes no weights"):
        adapters_from(model, {})


def test_a_pack_can_be_trained_further_and_packed_again(folders, blocks, capsys):
    """Its ranks stay, so nothing but rounding is lost."""
    pytest.importorskip("peft")
    text = folders / "text.txt"
    text.write_text(tiny.TEXT * 100)
    words = ["train", str(folders / "pack"), str(folders / "further"), "--train-pack", "--data", str(text)]
    words += ["--tokens", "1024", "--block-tokens", "32", "--learning-rate", "3e-3", "--evaluate-tokens", "0"]
    words += ["--precision", "fp32", "--device", "cpu"]
    assert cli.main([*words, "--dry-run"]) == 0
    before = Pack.load(folders / "pack")
    numbers = sum(change.a.numel() + change.b.numel() for change in before.changes.values())
    assert f"trained {numbers / 1e6:,.1f} M" in capsys.readouterr().out
    assert cli.main(words) == 0
    about = training_of(folders / "further")
    assert (about["tokens"], about["data"]) == (1024, ["text.txt"])
    again = [*words[:1], str(folders / "further"), str(folders / "twice"), "--lora-rank", "2", *words[4:]]
    assert cli.main(again) == 0
    assert training_of(folders / "twice")["tokens"] == 2048
    trained, old = (ElasticModel.from_pretrained(folders / name) for name in ("further", "pack"))
    base = ElasticModel.from_pretrained(folders / "base", dtype="float32")
    most = numbers + 4 * sum(len(change.scales) for change in before.changes.values())
    most += sum(other.nbytes for other in before.others.values()) + 8 * trained.ranking.neurons.numel()
    after = make_pack(trained, base, blocks, base_name="base", max_bytes=most)
    ranks = [{name: len(change.scales) for name, change in pack.changes.items()} for pack in (before, after)]
    assert ranks[0] == ranks[1]
    expected, found, at_first = (tiny.logits_of(model, blocks.tokens) for model in (trained, base, old))
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert (at_first - expected).abs().max() > 0.05 * expected.abs().max()


def test_what_has_no_changes_to_train(folders, capsys):
    words = ["train", str(folders / "trained"), str(folders / "out"), "--train-pack", "--device", "cpu"]
    assert cli.main(words) == 2
    assert "trained is no pack, so it has no changes to train. Make one with `flextron pack`" in capsys.readouterr().err
    for other in (["--lora-rank", "2"], ["--train-embeddings"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*words, *other])
        assert "--train-pack" in capsys.readouterr().err


def test_command(folders, capsys):
    text = folders / "text.txt"
    text.write_text(tiny.TEXT * 400)
    words = ["pack", str(folders / "trained"), str(folders / "made"), "--base", str(folders / "base")]
    words += ["--text", str(text), "--calibration-text", str(text), "--tokens", "512", "--calibration-tokens", "512"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "| 60% |" in said
    assert "MB. Use it as MODEL" in said
    assert "What the pack loses" in (folders / "made" / "README.md").read_text()
    assert cli.main(["generate", str(folders / "made"), "The fox", "--subnet", "60%", "--max-new-tokens", "3"]) == 0
    assert cli.main(words) == 2
    assert "made exists" in capsys.readouterr().err


def test_many_texts_are_counted_and_few_are_named():
    assert text_names(["corpus/a.jsonl.xz", "sample/train"]) == "a.jsonl.xz, sample/train"
    assert text_names([f"{name}.jsonl" for name in "abcdefg"]) == "7 texts"
