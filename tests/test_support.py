"""The table of what is supported says what the tests say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_table_is_made_of_the_tests(tmp_path: Path) -> None:
    made = tmp_path / "support.md"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", f"--support-table={made}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300, env=environment)
    assert made.read_text() == (ROOT / "docs" / "support.md").read_text()
