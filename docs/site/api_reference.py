"""The `api` directive of the site: public names with their signatures and docstrings.

    ```{api}
    ElasticModel
    rank
    ```

The source is read, not imported, so the site builds without torch. A name that is not public, or a public one that no
page has, is a warning, on which `make docs` fails.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

SOURCE = Path(__file__).parents[2] / "src"
logger = logging.getLogger(__name__)
package: Any = griffe.load(
    "flextron", search_paths=[SOURCE], docstring_parser="google", docstring_options={"warnings": False}
)
shown: set[str] = set()


class Api(SphinxDirective):
    """Shows the names that stand in its body, one a line."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The nodes of all names."""
        names = [line.strip() for line in self.content if line.strip()]
        for name in set(names) - set(package.exports):
            logger.warning("flextron.%s is not public (flextron.__all__)", name, location=self.get_location())
        known = [name for name in names if name in package.exports]
        shown.update(known)
        return self.parse_text_to_nodes("\n\n".join(entry(name) for name in known))


def entry(name: str) -> str:
    """One public name, as Markdown with Sphinx's directives."""
    thing = package[name]
    thing = thing.final_target if thing.is_alias else thing
    head = thing.signature().replace("\n", " ") or name
    if not thing.is_class:
        return _directive("py:function", head, docstring(thing))
    members = "\n\n".join(member(each) for each in thing.all_members.values() if _is_shown(each))
    return _directive("py:class", head, f"{docstring(thing)}\n\n{members}", ticks=5)


def member(thing: Any) -> str:
    """A method, property or field of a class."""
    thing = thing.final_target if thing.is_alias else thing
    if not thing.is_function:
        kind = f":type: {thing.annotation}\n" if thing.annotation else ""
        return _directive("py:attribute", thing.name, docstring(thing), options=kind)
    kind = "classmethod" if "classmethod" in thing.labels else "staticmethod" if "staticmethod" in thing.labels else ""
    head = thing.signature().replace("\n", " ").replace("(self, ", "(").replace("(self)", "()").replace("(cls, ", "(")
    return _directive("py:method", head, docstring(thing), options=f":{kind}:\n" if kind else "")


def docstring(thing: Any) -> str:
    """The docstring as Markdown; arguments and errors as field lists."""
    parts = thing.docstring.parsed if thing.docstring else []
    return "\n\n".join("\n".join(_section(part)) for part in parts)


def _section(part: Any) -> Iterator[str]:
    if part.kind is griffe.DocstringSectionKind.text:
        yield part.value
    elif part.kind is griffe.DocstringSectionKind.parameters:
        yield from (f":param {each.name}: {_line(each.description)}" for each in part.value)
    elif part.kind is griffe.DocstringSectionKind.raises:
        yield from (f":raises {each.annotation}: {_line(each.description)}" for each in part.value)
    else:
        yield from (f":returns: {_line(each.description)}" for each in part.value)


def _line(text: str) -> str:
    return " ".join(text.split())


def _is_shown(thing: Any) -> bool:
    return not thing.name.startswith("_") and thing.has_docstring


def _directive(kind: str, head: str, body: str, *, options: str = "", ticks: int = 4) -> str:
    fence = "`" * ticks
    return f"{fence}{{{kind}}} {head}\n{options}\n{body}\n{fence}"


def _check_complete(_app: Sphinx, _env: Any) -> None:
    missing = sorted(set(package.exports) - shown)
    if missing and shown:  # nothing is shown where no page with the directive was built anew
        logger.warning("public names without an entry in the reference: %s", ", ".join(missing))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("api", Api)
    app.connect("env-check-consistency", _check_complete)
    return {"parallel_read_safe": False}
