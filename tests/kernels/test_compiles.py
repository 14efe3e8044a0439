"""The kernels compile for real GPUs, and fit: what the interpreter cannot show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("arch", "head_dims"), [("90", "64,128"), ("89", "128")])
def test_kernels_compile_without_spilling(arch: str, head_dims: str, tmp_path: Path) -> None:
    """For Hopper, and for Ada, which has the least shared memory."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.kernel_resources"),
            *("--arch", arch, "--head-dims", head_dims),
        ],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| ok |") >= 15
