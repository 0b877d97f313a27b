import os
import subprocess
import sys

import pytest

from tests.unit.test_architecture import ROOT


def test_the_triton_kernels_compute_attention():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.interpreted"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("decode") == 4
    assert done.stdout.count("prefill") == 3
    assert done.stdout.count("fused ") == done.stdout.count("compiled ") == 2
    assert done.stdout.endswith("checked itself\na wrong merge is caught\n")
