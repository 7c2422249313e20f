"""The import contract sees every import: no module is loaded by a string, the lazy table in `__init__` apart."""

import re
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "flextron"


def test_no_module_is_loaded_by_a_string():
    by_string = re.compile(r"""(import_module|__import__)\(\s*f?["'](flextron|\.)""")
    found = [path for path in SOURCE.rglob("*.py") if by_string.search(path.read_text(encoding="utf8"))]
    assert found == [SOURCE / "__init__.py"]
