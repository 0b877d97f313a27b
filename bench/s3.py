"""An S3 server of one's own: moto's, in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from bench.clusters import wait_for

BUCKET = "berth"


def program() -> str | None:
    """moto_server, beside this interpreter; None where moto is not installed."""
    return shutil.which("moto_server", path=str(Path(sys.executable).parent))


@contextmanager
def s3_server(port: int) -> Generator[subprocess.Popen[bytes]]:
    """The server on this port of 127.0.0.1, with an empty bucket BUCKET; it ends with the block."""
    argv = [str(program()), "-H", "127.0.0.1", "-p", str(port)]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:

        def up() -> bool:
            try:
                return urllib.request.urlopen(address, timeout=5).status == 200
            except OSError:
                return False

        try:
            wait_for(up, 60)
            urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=5).close()
            yield process
        finally:
            process.kill()  # a stopped process hears no other signal
