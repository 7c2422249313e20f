"""What `import flextron` gives: it is whole, so that public nouns are enough to call every public verb."""

import ast
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import flextron

# Made by verbs and by ElasticModel only, so what they hold need not be public.
MADE_BY_VERBS = {
    "Evaluation",
    "ExportReport",
    "GgufReport",
    "Pack",
    "Routed",
    "Router",
    "SubLayer",
    "TaskResult",
    "TokenRouter",
}
CALLED = ("__init__", "__call__")


def public():
    return {name: getattr(flextron, name) for name in flextron.__all__}


def imported_for_types():
    """Home of each name that type checkers see, as the package's own source imports it."""
    tree = ast.parse(Path(flextron.__file__).read_text(encoding="utf8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    return {alias.name: node.module.removeprefix("flextron.") for node in block.body for alias in node.names}


def test_every_name_is_there_and_types_and_lazy_loading_agree():
    assert len(flextron.__all__) == len(set(flextron.__all__))
    assert imported_for_types() == flextron._HOMES
    assert set(flextron.__all__) == set(flextron._HOMES)
    assert all(public().values())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flextron.nothing  # noqa: B018
    assert (Path(flextron.__file__).parent / "py.typed").is_file()


def signatures() -> Iterator[tuple[str, typing.Any]]:
    """Name and function of every public verb, and of every public method of a public noun."""
    for name, thing in public().items():
        if not inspect.isclass(thing):
            yield name, thing
            continue
        for method, value in inspect.getmembers(thing):
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            ours = inspect.isfunction(function) and (method == "__init__" or "flextron" in function.__module__)
            if ours and (not method.startswith("_") or (method in CALLED and name not in MADE_BY_VERBS)):
                yield f"{name}.{method}", function


def classes(annotation) -> Iterator[type]:
    """Every class of flextron that an annotation names, however deep."""
    if isinstance(annotation, list | tuple):
        for part in annotation:
            yield from classes(part)
    elif not isinstance(annotation, str):
        yield from classes(typing.get_args(annotation))
        named = typing.get_origin(annotation) or annotation
        if inspect.isclass(named) and named.__module__.startswith("flextron"):
            yield named


def is_public(named: type) -> bool:
    """A class counts as public where the public one of its name is made of it, as `ElasticModel` is."""
    same = getattr(flextron, named.__name__, None)
    return inspect.isclass(same) and named in same.__mro__


def test_annotations_name_public_classes():
    hidden = {
        f"{name}({parameter}: {named.__name__})"
        for name, function in signatures()
        for parameter, annotation in typing.get_type_hints(function, localns={"Self": flextron.ElasticModel}).items()
        for named in classes(annotation)
        if not is_public(named)
    }
    assert not hidden


def test_the_walk_finds_what_is_hidden():
    walked = dict(signatures())
    assert {"evaluate", "Pairs.__init__", "LossMeter.__call__", "ElasticModel.from_pretrained"} < set(walked)
    assert flextron.TokenRun in set(classes(typing.get_type_hints(flextron.evaluate)["runs"]))
    assert not is_public(type("Hidden", (), {}))
