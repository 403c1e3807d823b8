"""What tests of MCP share: a server with everything, in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).parent.parent / "conformance" / "server.py"


@pytest.fixture(scope="module")
def fixtures() -> Iterator[str]:
    """The address of a server with everything."""
    command = [sys.executable, "-W", "ignore", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()
