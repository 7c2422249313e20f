"""Put pip into a virtual environment made with --without-pip: Debian's python3 alone has no ensurepip.

Usage: VENV/bin/python tools/get_pip.py
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

RELEASE = "https://pypi.org/pypi/pip/26.3/json"
SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"


def main() -> None:
    """Download pip's wheel, check it, and let it install itself."""
    with urllib.request.urlopen(RELEASE, timeout=60) as answer:
        urls = [file["url"] for file in json.load(answer)["urls"] if file["url"].endswith(".whl")]
    with urllib.request.urlopen(urllib.parse.urljoin(RELEASE, urls[0]), timeout=60) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"the wheel of pip has another checksum than expected: {urls[0]}")
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / "pip-26.3-py3-none-any.whl"
        wheel.write_bytes(content)
        install = [sys.executable, f"{wheel}/pip", "install", "--quiet", "--no-index", str(wheel)]
        subprocess.run(install, check=True)


if __name__ == "__main__":
    main()
