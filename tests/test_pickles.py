"""Pickles: read as safetensors are, never unpickled into code, and refused in one clear line."""

import argparse
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from pairs import add_update, llama_tensors, write
from refusals import refused
from results import same_tables

import lowrank_probe as lp
from lowrank_probe.checkpoints import open_checkpoint


def write_pickle(directory, tensors, config=None, **options):
    directory.mkdir(parents=True)
    torch.save(tensors, directory / "pytorch_model.bin", **options)
    (directory / "config.json").write_text(json.dumps(config or {}))
    return directory


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles_give_what_safetensors_give(tmp_path, zipped):
    base, tuned = llama_tensors(), add_update(llama_tensors())
    expected = lp.spectrum(write(tmp_path / "a", base), write(tmp_path / "b", tuned))
    sides = [
        write_pickle(tmp_path / f"{name}_bin", tensors, _use_new_zipfile_serialization=zipped)
        for name, tensors in (("a", base), ("b", tuned))
    ]
    same_tables(lp.spectrum(*sides), expected)


def test_shards_of_pickles(tmp_path):
    tensors = llama_tensors()
    names = sorted(tensors)
    for i in range(2):
        torch.save({name: tensors[name] for name in names[i::2]}, tmp_path / f"pytorch_model-{i}.bin")
    weight_map = {name: f"pytorch_model-{i}.bin" for i in range(2) for name in names[i::2]}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    side = open_checkpoint(tmp_path)
    assert set(side.tensors) == set(tensors)
    assert all(torch.equal(side.read(name), tensor) for name, tensor in tensors.items())
    assert len(side.files) == 2


def test_a_state_dict_inside_a_training_checkpoint(tmp_path):
    tensors = llama_tensors()
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "last.pt")
    assert set(open_checkpoint(tmp_path / "last.pt").tensors) == set(tensors)


def test_a_pickle_that_holds_a_non_tensor(tmp_path):
    torch.save({"w": torch.ones(2, 2), "epoch": 3}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "epoch is of type int", "give a state dict alone")
    torch.save([torch.ones(2)], tmp_path / "b.bin")
    refused(tmp_path / "b.bin", "found list")


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"w": Evil()}, tmp_path / "evil.bin")
    refused(tmp_path / "evil.bin", "system", "refused", "safetensors")
    assert not (tmp_path / "ran").exists()


class Net(torch.nn.Linear):
    """A module as training scripts save it whole."""


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"args": argparse.Namespace(a=1)}, "argparse.Namespace"), (Net(2, 2), "test_pickles.Net"),
        ({"w": np.ones(2)}, "numpy."),
    ],
    ids=["namespace", "module", "numpy"],
)  # fmt: skip
def test_a_class_that_is_not_unpickled_is_named(tmp_path, content, name):
    torch.save(content, tmp_path / "a.pt")
    line = refused(tmp_path / "a.pt", f"holds {name}", "safetensors")
    assert "GLOBAL" not in line


@pytest.mark.parametrize("content", [b"", os.urandom(999), pickle.dumps({"a": 1})], ids=["empty", "noise", "pickle"])
def test_what_torch_did_not_write_is_refused_without_its_advice_or_warnings(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    line = refused(tmp_path / "a.pt", "cannot be opened as PyTorch weights", "download it again")
    assert "weights_only" not in line


def test_keys_that_are_no_names_and_tensors_without_entries_of_their_own(tmp_path):
    torch.save({0: torch.ones(2, 2)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "its key 0 is of type int", "name → tensor")
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "w is stored as sparse_coo", "to_dense()")


def test_a_view_of_a_transposed_tensor(tmp_path):
    W = torch.arange(12.0).reshape(3, 4)
    torch.save({"w": W.T}, tmp_path / "a.pt")
    assert torch.equal(open_checkpoint(tmp_path / "a.pt").read("w", span=(3, 6)), W.T.reshape(-1)[3:9])


def test_a_truncated_pickle(tmp_path):
    torch.save(llama_tensors(), tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:2000])
    refused(tmp_path / "a.bin", "cannot be opened as PyTorch weights")


def test_memory_mapped_pickles_are_not_read_before_they_are_asked_for(tmp_path):
    """A 256 MB pickle is opened and one small tensor read: far less than the file becomes resident."""
    torch.save({"big": torch.zeros(2**26), "small": torch.ones(4)}, tmp_path / "a.bin")
    code = (
        "import resource, sys, torch; from lowrank_probe.checkpoints import open_checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "side = open_checkpoint(sys.argv[1]); assert side.read('small').sum() == 4\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.bin"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024
