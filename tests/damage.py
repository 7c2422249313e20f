"""One small folder with every kind of file that flextron reads back, ways to damage them, and what reads them."""

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from flextron import ElasticModel, Subnet, TrainConfig, generate, route, route_tokens
from flextron.budget import Budget
from flextron.choosing.choice import choose
from flextron.choosing.routing import greedy_answer
from flextron.cli import main, parse
from flextron.config import OptimizerOptions, QuickstartConfig, TextOptions, VisitOptions, WatchOptions
from flextron.costs.pricing import ceilings
from flextron.costs.saved import describe, find_table, table_from_csv
from flextron.costs.table import CostTable
from flextron.data.blocks import load_blocks
from flextron.data.corpus import Corpus
from flextron.demo import quickstart
from flextron.errors import FlextronError
from flextron.exporting.exporters import GgufExporter, HfExporter
from flextron.routers.static.making import describe_router, sensitivity_of
from flextron.routers.static.pairs import Pairs
from flextron.routers.static.router import Router
from flextron.routers.token.making import describe_token_router, load_token_router
from flextron.routers.token.slopes import KeptSlopes, Slopes
from flextron.tasks.harness import _Kept
from flextron.training import run as training
from flextron.training.folder import RunFolder

WRITTEN = Path(__file__).parent / "written_by_0_1_0"
LONGEST_MESSAGE = 480
DEEP = "[" * 100_000
VALUES = (
    *("null", "true", "NaN", "Infinity", "-Infinity", "1e400", "-1", "0", "0.5", "1000000000", "123456789012345678901"),
    *('"x"', '""', "[]", "{}", "[[]]", "[null]", '{"x": 1}', '"\\ud800"', "1" * 400, "9" * 5000),
    *('"' + "x" * 5000 + '"', DEEP, "[" * 500 + "]" * 500),
)
"""What a value in a JSON file is replaced by."""
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "flextron.json",
    "ranking.safetensors",
    "*token*",
    "generation_config.json",
    "*.jinja",
)


def make_folder(root: Path) -> Path:
    """Everything that 0.1.0 wrote, with what it did not write: exports, a cache, journals, recipes."""
    shutil.copytree(WRITTEN, root, dirs_exist_ok=True)
    (root / "elastic" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    shutil.copy(root / "run" / "train.json", root / "elastic")
    model = ElasticModel.from_pretrained(root / "elastic", dtype="float32")
    subnet = model.search_space.full.with_width("neurons", 0, 16)
    HfExporter().write(model, subnet, root / "per_layer", verify=False)
    GgufExporter("f16").write(model, model.search_space.uniform(16, 1), root / "model.gguf", verify=False)
    (root / "text.jsonl").write_text(
        json.dumps({"text": tiny.TEXT * 3}) + "\n" + json.dumps({"text": "fox " * 200}) + "\n"
    )
    (root / "recipe.yaml").write_text("budget: tpot=0.6x\nany-device: true\nmax-new-tokens: 2\n")
    (root / "times.csv").write_text(_times(model))
    quickstart._prepare(QuickstartConfig(out=root / "quickstart"))
    kept = _Kept(root / "results.jsonl")
    for number in range(3):
        kept.add(
            {"run": number},
            {"scores": {"acc": [1.0, 0.0]}, "documents": ["a/0", "a/1"], "share": 1.0, "cost": None, "chance": 0.5},
        )
    slopes = Slopes(*(torch.ones(size, dtype=dtype) for size, dtype in SLOPES))
    KeptSlopes(root, {}).save(0, slopes)
    read_cache(root, model)
    return root


SLOPES = (((12, 8, 16), torch.bfloat16), ((12, 8), torch.float32), ((12, 8), torch.float32), ((8,), torch.float32))


def _times(model: ElasticModel) -> str:
    space = model.search_space
    rows = [f"{n},{k},{1 + n / 8 + k}" for n in space.neurons[::2] for k in space.kv_groups]
    return "neurons,kv_groups,ms\n" + "\n".join(rows) + "\n"


# ---------------------------------------------------------------------- damage


def damage(file: Path, others: list[Path], how: str, draw: random.Random) -> bytes:
    """The content of a file after one change."""
    content = file.read_bytes()
    return DAMAGES[how](content, draw, file, others)


def _json_value(content: bytes, draw: random.Random, file: Path, others: list[Path]) -> bytes:
    if file.suffix == ".safetensors":
        return _in_header(content, lambda header: _json_value(header, draw, Path("x.json"), []))
    lines = content.split(b"\n") if file.suffix == ".jsonl" else [content]
    at = draw.choice([place for place, line in enumerate(lines) if line])
    try:
        data = json.loads(lines[at])
    except ValueError:
        return _bytes(content, draw, file, others)
    marker = "@damaged@"
    data = _replaced(data, draw, marker)
    lines[at] = json.dumps(data).replace(f'"{marker}"', draw.choice(VALUES)).encode("utf8", "surrogatepass")
    return b"\n".join(lines)


def _replaced(data: Any, draw: random.Random, marker: str) -> Any:
    """The data with one value, drawn at any depth, replaced, left out or added."""
    inside = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    if not inside or draw.random() < 0.15:
        return marker
    key, value = draw.choice(inside)
    copied = dict(data) if isinstance(data, dict) else list(data)
    action = draw.random()
    if isinstance(value, (dict, list)) and value and action < 0.75:
        copied[key] = _replaced(value, draw, marker)
    elif action < 0.85:
        copied[key] = marker
    elif action < 0.95:
        del copied[key]
    elif isinstance(copied, dict):
        copied["added"] = marker
    else:
        copied.append(value)
    return copied


def _in_header(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _bytes(content: bytes, draw: random.Random, *_: Any) -> bytes:
    changed = bytearray(content)
    for _time in range(draw.choice((1, 1, 4, 32))):
        if changed:
            changed[draw.randrange(min(len(changed), draw.choice((64, 2000, 1 << 30))))] = draw.choice(
                (0, 255, 10, 34, draw.randrange(256))
            )
    return bytes(changed)


def _truncated(content: bytes, draw: random.Random, *_: Any) -> bytes:
    return content[: draw.choice((0, 1, draw.randrange(len(content) + 1), max(0, len(content) - 1)))]


def _garbage_tail(content: bytes, draw: random.Random, *_: Any) -> bytes:
    return content + draw.choice(
        (b"\0" * 100, b"garbage", b"\xff\xfe\n", b"{}\n", b"[1]\n", b"null\n", b"\n\n", content)
    )


def _broken_line(content: bytes, draw: random.Random, *_: Any) -> bytes:
    lines = content.split(b"\n")
    lines[draw.randrange(len(lines))] = draw.choice(
        (b"{", b"null", b"[]", b"\xff\xff", b"7", b"{}", b'{"step": 1}', b"x" * 3000)
    )
    return b"\n".join(lines)


def _numbers(content: bytes, draw: random.Random, file: Path, _: Any) -> bytes:
    """Some numbers of tensors become NaN, infinite, huge or negative."""
    if file.suffix not in (".safetensors", ".gguf"):
        return _bytes(content, draw)
    start = 8 + int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else len(content) // 2
    changed = bytearray(content)
    for value in range(draw.choice((1, 20, 2000))):
        at = start + 4 * draw.randrange(max(1, (len(content) - start) // 4 - 1))
        value = draw.choice(
            (
                b"\0\0\xc0\x7f",
                b"\0\0\x80\x7f",
                b"\xff\xff\x7f\x7f",
                b"\0\0\x80\xff",
                b"\0\0\x80\xbf",
                b"\xff\xff\xff\xff",
            )
        )
        changed[at : at + 4] = value
    return bytes(changed[: len(content)])


def _swapped(content: bytes, draw: random.Random, file: Path, others: list[Path]) -> bytes:
    return draw.choice([other for other in others if other != file]).read_bytes()


DAMAGES = {
    "json value": _json_value, "bytes": _bytes, "truncated": _truncated, "garbage tail": _garbage_tail,
    "broken line": _broken_line, "numbers": _numbers, "swapped": _swapped,
}  # fmt: skip


# ---------------------------------------------------------------------- readers


def _finite(*numbers: float | torch.Tensor) -> None:
    assert all(torch.as_tensor(number).isfinite().all() for number in numbers), numbers


def read_model(root: Path, _: Any, where: str = "elastic") -> None:
    model = ElasticModel.from_pretrained(root / where)
    generate(model, "The fox", max_new_tokens=2)
    ids = torch.arange(4)[None] % model.config.vocab_size
    with torch.no_grad():
        _finite(model(ids).logits.float())
    with model.use(model.search_space.smallest):
        pass
    if model.tokenizer is not None and model.tokenizer.chat_template:
        with suppress(ValueError):  # a template may write more than the model reads
            generate(model, "fox", max_new_tokens=1, chat=True)


def read_gguf(root: Path, _: Any) -> None:
    read_model(root, None, "model.gguf")


def read_per_layer(root: Path, _: Any) -> None:
    from flextron.elastic.checkpoint import load

    lm = load(root / "per_layer").lm
    with torch.no_grad():
        _finite(lm(torch.arange(4)[None] % lm.config.vocab_size).logits.float())


def read_sensitivity(root: Path, model: ElasticModel) -> None:
    folder = root / "elastic"
    sensitivity = sensitivity_of(model, folder)
    model.search_space.check(sensitivity.allocate(0.6))
    model.search_space.check(choose(model, "60%", folder))
    model.search_space.check(greedy_answer(sensitivity, ceilings(model, Budget.parse("80k"), None)))


def read_tables(root: Path, model: ElasticModel) -> None:
    folder = root / "elastic"
    for metric in ("tpot", "ttft"):
        table = find_table(model, folder, metric, foreign=True)
        describe(table)
        _finite(table.full, table.smallest)
        assert table.full > 0
    for file in (folder / "latency").glob("*.json"):
        CostTable.load(file)
    read_route(root, model)


def read_route(root: Path, model: ElasticModel) -> None:
    for budget in ("tpot=0.6x,ttft=0.7x", "80k"):
        answer = route(model, budget, root / "elastic", any_device=True)
        model.search_space.check(answer.subnet)
        answer.costs()
        if answer.router is not None:
            describe_router(answer.router)
            _finite(answer.router.predicted_loss(answer.subnet), *(check.loss for check in answer.router.about.checks))


def read_router(root: Path, model: ElasticModel) -> None:
    Router.load(root / "elastic", "tpot", model)
    read_route(root, model)


def read_token_router(root: Path, model: ElasticModel) -> None:
    describe_token_router(*load_token_router(root / "elastic", "tpot", model))
    routing = route_tokens(model, "tpot=0.6x", root / "elastic", any_device=True)
    generate(model, "The fox", routing=routing, max_new_tokens=2)
    _finite(routing.average_cost)


def read_pairs(root: Path, model: ElasticModel) -> None:
    (file,) = (root / "elastic" / "routers").glob("pairs-*.jsonl")
    header = json.loads(next((WRITTEN / "elastic" / "routers").glob("pairs-*.jsonl")).read_text().splitlines()[0])
    pairs = Pairs(file, {key: value for key, value in header.items() if key != "version"})
    for subnet, loss in pairs.measured().items():
        model.search_space.check(subnet)
        _finite(loss)


def read_run(root: Path, _: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        again = root.parent / "again"
        shutil.rmtree(again, ignore_errors=True)
        again.mkdir()
        for name in ("elastic", "text.txt"):
            (again / name).symlink_to(root / name)
        shutil.copytree(root / "run", again / "run")
        patch.chdir(again)

        def stop(_run: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(training.TrainingRun, "train_step", stop)
        config = TrainConfig(
            "elastic",
            Path("run"),
            text=TextOptions(data=("text.txt",), tokens=1048576, block_tokens=32),
            visit=VisitOptions(visits_per_step=1),
            optimizer=OptimizerOptions(lora_rank=1),
            watch=WatchOptions(evaluate_tokens=0, save_minutes=60),
        )
        try:
            training.train(config)
        except KeyboardInterrupt:
            RunFolder(Path("run")).metrics()


def read_subnet(root: Path, model: ElasticModel) -> None:
    model.search_space.check(Subnet.load(root / "subnet.json"))


def read_text(root: Path, model: ElasticModel) -> None:
    load_blocks(model.tokenizer, root / "text.jsonl", tokens=64, block_tokens=32)


def read_csv(root: Path, model: ElasticModel) -> None:
    table = table_from_csv(root / "times.csv", model.search_space, phase="decode", conditions={})
    _finite(table.full)


def read_recipe(root: Path, _: Any) -> None:
    with suppress(SystemExit):  # a message of one line, which test_cli has
        parse(["generate", str(root / "elastic"), "fox", "--recipe", str(root / "recipe.yaml")])


def read_quickstart(root: Path, _: Any) -> None:
    quickstart._prepare(QuickstartConfig(out=root / "quickstart"))


def read_results(root: Path, _: Any) -> None:
    from flextron.tasks.harness import _Loaded, _result

    kept = _Kept(root / "results.jsonl")
    for number in range(3):
        if kept.has({"run": number}):
            result = _result("run", _Loaded("arc_easy", 0, {}, {}, {}), kept.of({"run": number}))
            _finite(result.accuracy, result.share)


def read_slopes(root: Path, _: Any) -> None:
    slopes = KeptSlopes(root, {}).load(0)
    if slopes is not None:
        assert [tuple(tensor.shape) for tensor in slopes] == [shape for shape, _ in SLOPES]
        _finite(*(tensor.float() for tensor in slopes))


def read_cache(root: Path, model: ElasticModel) -> None:
    corpus = Corpus(model.tokenizer, [str(root / "text.txt")], block_tokens=32, cache=root / "cache")
    tokens = corpus.next_blocks(2)
    assert tokens.max() < model.config.vocab_size


def on_command_line(*arguments: str) -> Callable[[Path, Any], None]:
    """A reader that runs a command in this process: it works, or says what is wrong in one line."""

    def read(root: Path, _: Any) -> None:
        import io
        from contextlib import redirect_stderr, redirect_stdout

        said = io.StringIO()
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            code = main([argument.replace("@", str(root)) for argument in arguments])
        assert code in (0, 2), code
        if code == 2:
            *before, error = said.getvalue().splitlines()
            assert error.startswith("error: "), (before, error)
            assert "Traceback" not in "".join(before), before
            assert len(error.replace(str(root), "")) <= LONGEST_MESSAGE, error

    return read


ROUTE = on_command_line("route", "@/elastic", "--budget", "tpot=0.6x", "--any-device", "--no-measure")
GENERATE = on_command_line("generate", "@/elastic", "The fox", "--max-new-tokens", "2")
EVALUATE = on_command_line("evaluate", "@/elastic", "--text", "@/text.jsonl", "--tokens", "32", "--block-tokens", "32")
EVALUATE_GGUF = on_command_line(
    "evaluate", "@/model.gguf", "--text", "@/text.txt", "--tokens", "32", "--block-tokens", "32"
)
READERS: dict[str, tuple[Callable[[Path, Any], None], ...]] = {
    **{f"elastic/{name}": (read_model, GENERATE, EVALUATE) for name in MODEL_FILES},
    "elastic/sensitivity.json": (read_sensitivity, ROUTE),
    "elastic/train.json": (on_command_line("export", "@/elastic", "@/../export", "--overwrite", "--no-verify"),),
    "elastic/rank.json": (on_command_line("rank", "@/elastic", "@/elastic"),),
    "elastic/latency/*": (read_tables, ROUTE),
    "elastic/routers/tpot/*": (read_router, ROUTE),
    "elastic/routers/tpot-per-token/*": (read_token_router,),
    "elastic/routers/pairs-*": (read_pairs,),
    "run/*": (read_run,),
    "subnet.json": (read_subnet,),
    "text.jsonl": (read_text, EVALUATE),
    "times.csv": (read_csv,),
    "recipe.yaml": (read_recipe,),
    "quickstart/*": (read_quickstart,),
    "results.jsonl": (read_results,),
    "routers/slopes*": (read_slopes,),
    "cache/*": (read_cache,),
    "model.gguf": (read_gguf, EVALUATE_GGUF),
    "per_layer/*": (read_per_layer,),
}


def readers(name: str) -> tuple[Callable[[Path, Any], None], ...]:
    return next((found for pattern, found in READERS.items() if fnmatch(name, pattern)), ())


def names(root: Path) -> list[str]:
    """The files that something reads."""
    found = (str(file.relative_to(root)) for file in sorted(root.rglob("*")) if file.is_file())
    return [name for name in found if readers(name) and not name.endswith((".md", ".sh"))]


def check(root: Path, model: ElasticModel, name: str, how: str, seed: int) -> str:
    """Damage one file and read it: "worked" or the message. Any other error than a FlextronError is ours."""
    file = root / name
    before = file.read_bytes()
    outcome = "worked"
    try:
        file.write_bytes(damage(file, [root / other for other in names(root)], how, random.Random(seed)))  # noqa: S311
        for read in readers(name):
            try:
                read(root, model)
            except FlextronError as error:
                outcome = str(error)
                plain = outcome.replace(str(root), "")
                assert len(plain.splitlines()) == 1, plain
                assert len(plain) <= LONGEST_MESSAGE, plain
                assert not {"memory", "allocate"} & set(plain.lower().split()), plain
    finally:
        file.write_bytes(before)
    return outcome
