"""The benchmarks that have a small form still run with the library as it is: nothing else calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["plan_405b.py"], ["gpu.py"], ["several_gpus.py", "--rounds", "1"], ["cpu_steps.py"], ["eigensolvers.py"]],
    ids=lambda command: command[0],
)
def test_the_small_form_of_a_benchmark_runs(command, tmp_path):
    before = {page: page.stat().st_mtime for page in BENCHMARKS.parent.joinpath("docs").iterdir()}
    done = subprocess.run(
        [sys.executable, BENCHMARKS / command[0], "--tiny", *command[1:]],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {page: page.stat().st_mtime for page in BENCHMARKS.parent.joinpath("docs").iterdir()} == before
