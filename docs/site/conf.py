"""How `make docs` builds the site: the Markdown pages as they stand, and the API reference from the docstrings.

The source folder is the whole repository, so that a link from a page to any file works on GitHub and on the site: to a
page as a link, to another file as a download. A link to nothing is a warning, and `make docs` fails on warnings.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))  # for api_reference

project = "flextron"
copyright = "the flextron authors, Apache-2.0"
extensions = ["myst_parser", "api_reference"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md"]
exclude_patterns = [".*", "build", "dist", "out", "src", "tests", "benchmarks", "recipes", "tools", "examples"]
myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "flextron"
html_extra_path = ["index.html"]  # leads to docs/index.html
smartquotes = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
python_maximum_signature_line_length = 100

MENU = {
    "Start": ["/README", "install", "quickstart"],
    "Guide": [
        "rank",
        "training",
        "packs",
        "budgets",
        "routing",
        "per_token",
        "evaluate",
        "tasks",
        "generate",
        "serving",
        "serving-vllm",
        "deploy",
    ],
    "Reference": ["reference", "formats", "glossary", "architectures", "add_a_family", "architecture"],
    "Results": ["measured", "results", "results-few-tokens"],
    "Project": ["/CONTRIBUTING", "/CHANGELOG", "decisions/index"],
}
"""Kept here so that the pages stay plain Markdown, which GitHub shows as it stands."""


def add_menu(_app: Sphinx, page: str, source: list[str]) -> None:
    """Append the menu to the pages that stand above others."""
    if page == root_doc:
        source[0] += "".join(_entries(caption, pages) for caption, pages in MENU.items())
    elif page == "docs/decisions/index":
        source[0] += _entries("Decisions", ["0*"])


def _entries(caption: str, pages: list[str]) -> str:
    return "\n".join(["", "", "```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", "", *pages, "```", ""])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_menu)
