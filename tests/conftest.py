"""Fine-tunes of one base that several test files look at: two at planted angles, and some that grow."""

import shutil

import pytest
import torch
from pairs import add_update, llama_tensors, write
from steps import Q, rotated
from test_cli import probe

import lowrank_probe as lp


@pytest.fixture(scope="session")
def angled(tmp_path_factory):
    """(base, step a, step b, angles): one float64 matrix, two updates whose directions have known angles."""
    root, shape = tmp_path_factory.mktemp("angled"), (70, 50)
    angles = torch.linspace(0.1, 1.4, 16, dtype=torch.float64)
    s = torch.linspace(3, 1, 16, dtype=torch.float64)
    U_A, U_B, V_A, V_B = rotated(shape, angles)
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = {"model_type": "llama"}
    deltas = {"base": 0 * W, "a": (U_A * s) @ V_A.T, "b": 2 * (U_B * s) @ V_B.T}
    return *(write(root / name, {Q: W + delta}, config) for name, delta in deltas.items()), angles.numpy()


@pytest.fixture(scope="session")
def angled_trajectory(angled):
    return lp.trajectory(angled[0], angled[1:3])


@pytest.fixture(scope="session")
def growing(tmp_path_factory):
    """(base, [three steps]): a small bf16 Llama, an update of rank 4 that grows."""
    root = tmp_path_factory.mktemp("growing")
    base = llama_tensors(dtype=torch.bfloat16)
    steps = [add_update(base, relative=relative) for relative in (0.03, 0.06, 0.12)]
    config = {"model_type": "llama"}
    paths = [write(root / f"checkpoint-{i}00", step, config) for i, step in enumerate(steps, 1)]
    return write(root / "base", base, config), paths


@pytest.fixture(scope="session")
def saved(growing, tmp_path_factory):
    """(directory, stdout, stderr) of the finished command on the three steps."""
    out = tmp_path_factory.mktemp("saved") / "run"
    return out, *probe("spectrum", growing[0], *growing[1], "--out", out)


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the finished command's directory."""
    return shutil.copytree(saved[0], tmp_path / "run")
