"""The device that computes: found by name, kept only where its float64 is measured to be the faster."""

import math
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pairs import add_update, llama_tensors, write

import lowrank_probe as lp
from lowrank_probe import devices
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.devices import choose_device, decide, float64_s, start, started
from lowrank_probe.errors import ProbeError
from lowrank_probe.scheduling import run_jobs
from lowrank_probe.staged_reads import STAGE_BYTES

META = torch.device("meta")  # an accelerator that answers to nothing


def test_the_cpu_is_itself_and_is_not_probed():
    choice = choose_device("cpu")
    assert (choice.device, choice.note, choice.float64_s) == (torch.device("cpu"), "", {})


def test_auto_is_an_accelerator_only_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    choice = choose_device("auto")
    assert choice.device.type == expected or choice.note


def test_a_device_without_float64_leaves_the_work_to_the_cpu_and_says_so():
    assert math.isinf(float64_s(META))
    choice = decide(META, float64_s(META), 0.1)
    assert choice.device == torch.device("cpu")
    assert choice.note == "meta has no float64: spectra are computed on the CPU"
    assert choice.float64_s == {"meta": math.inf, "cpu": 0.1}


def test_the_faster_of_two_measured_times_decides():
    assert decide(META, 0.02, 0.1).device == META
    assert decide(META, 0.02, 0.1).note == ""
    slow = decide(META, 0.4, 0.1)
    assert slow.device == torch.device("cpu")
    assert slow.note == "meta takes 400 ms in float64 for a matrix that takes the CPU 100 ms: " + (
        "spectra are computed on the CPU"
    )


def test_the_probe_measures_a_real_spectrum():
    assert 0 < float64_s(torch.device("cpu")) < math.inf


@pytest.mark.parametrize(
    "asked", ["tpu", "cuda:99", "meta", "cpu:x", "mps:7" if not torch.backends.mps.is_available() else "x"]
)
def test_a_device_that_is_not_there_is_named(asked):
    with pytest.raises(ProbeError, match=f"--device {asked}: (expected|found)"):
        choose_device(asked)


def test_a_start_in_the_background_swallows_the_error_that_the_choice_raises():
    start("cuda:98", work="lowrank_probe.rows", then="lowrank_probe.reports")
    with pytest.raises(ProbeError, match="cuda:98"):
        choose_device("cuda:98")


@pytest.fixture
def prepared(monkeypatch):
    """Set once what a start on the CPU wants at the end is imported and prepared."""
    event = threading.Event()
    monkeypatch.setitem(sys.modules, "wanted_at_the_end", SimpleNamespace(prepare=event.set))
    monkeypatch.setattr(devices, "_computing", threading.Event())
    monkeypatch.setattr(devices, "_starting", [])
    start("cpu", work="lowrank_probe.rows", then="wanted_at_the_end")
    yield event
    started()


def test_on_a_cpu_what_is_wanted_at_the_end_is_imported_beside_the_first_matrix(prepared):
    assert not prepared.wait(0.2), "before anything is read it only takes turns with the reading"
    (before,) = run_jobs([1], abs, lambda item: prepared.is_set(), lambda _, was: was, torch.device("cpu"))
    assert not before
    assert prepared.wait(10)


def test_a_process_is_not_forked_while_another_thread_imports(prepared):
    started()
    assert prepared.is_set()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_several_cards_give_the_bits_of_one(tmp_path):
    base = llama_tensors(dtype=torch.bfloat16)
    sides = [write(tmp_path / "base", base), write(tmp_path / "tuned", add_update(base, relative=0.1))]
    one, every = (lp.spectrum(*sides, device=device) for device in ("cuda:0", "auto"))
    assert every.facts["device"]["n_devices"] == torch.cuda.device_count()
    assert every.table.drop(columns="seconds").equals(one.table.drop(columns="seconds"))
    assert all(np.array_equal(values, one.singular_values[name]) for name, values in every.singular_values.items())
    for device in ("cuda:0", "auto"):
        lp.extract(*sides, tmp_path / device.replace(":", ""), ranks=4, options=lp.Options(device=device))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("cuda0", "auto")]
    assert files[0] == files[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_buffer_is_filled_again_only_when_a_second_card_has_copied_it(tmp_path):
    side = open_checkpoint(write(tmp_path, {"a.weight": torch.arange(STAGE_BYTES, dtype=torch.float32)}))
    with torch.cuda.device(1):
        torch.cuda._sleep(1 << 31)  # copies to it wait for about a second
    assert torch.equal(side.read("a.weight", "cuda:1").cpu(), side.read("a.weight"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_a_card_is_that_of_the_file(tmp_path):
    A = torch.arange(3 * STAGE_BYTES // 4 + 5, dtype=torch.float32)
    side = open_checkpoint(write(tmp_path, {"a.weight": A, "b.weight": A[:7].bfloat16()}))
    for _ in range(3):
        assert torch.equal(side.read("a.weight", "cuda").cpu(), A)
        assert torch.equal(side.read("b.weight", "cuda").cpu(), A[:7].bfloat16())
        assert torch.equal(
            side.read("a.weight", "cuda", span=(3, 2 * STAGE_BYTES // 4)).cpu(), A[3:][: 2 * STAGE_BYTES // 4]
        )
