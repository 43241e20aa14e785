"""Tensors on disk: where they lie, that nothing stays, and what a matrix there gives: the bits it gives in memory."""

import math
import sys
import threading

import numpy as np
import pytest
import torch
from pairs import sides

from lowrank_probe import spilling
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.device_jobs import Memory
from lowrank_probe.devices import Choice
from lowrank_probe.errors import OutputError, ProbeError
from lowrank_probe.extraction_jobs import FactorsJob, pieces_of
from lowrank_probe.footprints import CARD_RESERVE, HOST_RESERVE, Footprint, Room, find_room
from lowrank_probe.matching import match
from lowrank_probe.options import Options
from lowrank_probe.rows import Settings
from lowrank_probe.selection import select
from lowrank_probe.spectrum_work import Job

CPU = torch.device("cpu")
MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def mapped(folder):
    """Bytes of files of a folder that are mapped, all of them without a name any more."""
    found = 0
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            if str(folder) in line:
                assert "(deleted)" in line
                start, stop = line.split()[0].split("-")
                found += int(stop, 16) - int(start, 16)
    return found


@linux
def test_within_it_large_tensors_lie_in_files_that_leave_nothing_behind(tmp_path):
    with spilling.on_disk(tmp_path):
        assert spilling.active()
        large = spilling.empty((1024, 2048), torch.bfloat16)
        small = spilling.empty((10, 10), torch.float32)
        assert mapped(tmp_path) == 4 * MIB
        assert spilling.empty((2048, 1024), torch.float32, "meta").is_meta
    assert not spilling.active()
    assert (large.shape, large.dtype, large.is_contiguous()) == ((1024, 2048), torch.bfloat16, True)
    assert small.shape == (10, 10)
    large.copy_(torch.arange(2048).bfloat16())
    assert float(large[1023, 100]) == 100
    assert list(tmp_path.iterdir()) == []
    view = large[5]
    del large
    assert mapped(tmp_path) == 4 * MIB, "a view keeps it"
    del view
    assert mapped(tmp_path) == 0
    assert spilling.empty((1024, 2048), torch.bfloat16).is_contiguous()
    assert mapped(tmp_path) == 0


def test_another_thread_is_not_within(tmp_path):
    found = []
    with spilling.on_disk(tmp_path):
        thread = threading.Thread(target=lambda: found.append(spilling.active()))
        thread.start()
        thread.join()
    assert found == [False]


def test_a_disk_without_room_is_one_line_that_names_the_folder(tmp_path):
    with (
        spilling.on_disk(tmp_path / "gone"),
        pytest.raises(OutputError, match=r"gone: no room for 4.19 MB of"),
    ):
        spilling.empty((1024, 2048), torch.bfloat16)
    if sys.platform == "linux":
        with spilling.on_disk(tmp_path), pytest.raises(OutputError, match=r"no room for 1.15e.* GB .*--out"):
            spilling.empty((1 << 30, 1 << 30), torch.uint8)
    assert list(tmp_path.iterdir()) == []


def _pair(tmp_path, kind):
    """(base, tuned) of one matrix larger than `spilling.LEAST` in every dtype."""
    generator = torch.Generator().manual_seed(0)
    m, n = (700, 3200) if kind == "wide" else (3200, 700)
    W = 0.02 * torch.randn(m, n, generator=generator)
    D = torch.randn(m, 8, generator=generator) @ torch.randn(8, n, generator=generator)
    relative = 2e-3 if kind == "swallowed" else 3e-2
    D *= relative * torch.linalg.norm(W) / torch.linalg.norm(D)
    if kind == "rows":
        D[::5] = 0
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    base = W.to(dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    return sides(tmp_path, {name: base}, {name: (base.float() + D).to(dtype)})


def _analysed(paths, room, **options):
    both = [open_checkpoint(path) for path in paths]
    (pair,) = match(*both, Options()).pairs
    job = Job(*both, {}, Settings(CPU, Options(**options)), 0.0, room)
    loaded = job.load(pair)
    held = mapped(room.folder)
    return job.compute(pair, loaded), held


@linux
@pytest.mark.parametrize("kind", ["tall", "wide", "rows", "swallowed", "float32"])
def test_a_matrix_on_disk_gives_what_it_gives_in_memory(tmp_path, kind):
    paths = _pair(tmp_path, kind)
    (folder := tmp_path / "spilled").mkdir()
    inside, none = _analysed(paths, Room(math.inf, math.inf, folder))
    outside, held = _analysed(paths, Room(math.inf, 1.0, folder))
    assert none == 0
    assert held >= 8 * 700 * 3200, "both sides and ΔW"
    assert list(folder.iterdir()) == []
    assert mapped(folder) == 0
    expected = {"rows": 0.2, "swallowed": 0.25}.get(kind, 0.0)
    assert inside.row["unchanged_fraction"] >= expected
    assert (inside.row["noise_model"] == "dead-zone") == (kind == "swallowed")
    if kind == "wide":  # columns are taken in larger blocks, which are summed in another order
        np.testing.assert_allclose(outside.values, inside.values, rtol=1e-9, atol=1e-12 * inside.values[0])
        return
    assert np.array_equal(outside.values, inside.values)
    assert outside.denoised is not None
    assert np.array_equal(outside.denoised, inside.denoised)
    both = [{key: value for key, value in one.row.items() if key != "seconds"} for one in (inside, outside)]
    np.testing.assert_equal(*both)


@linux
def test_base_rounded_and_top_work_on_disk_too(tmp_path):
    paths = _pair(tmp_path, "tall")
    (folder := tmp_path / "spilled").mkdir()
    for options in ({"base_rounded": True}, {"top": 8}):
        inside, _ = _analysed(paths, Room(math.inf, math.inf, folder), **options)
        outside, held = _analysed(paths, Room(math.inf, 1.0, folder), **options)
        assert held > 0
        assert np.array_equal(outside.values, inside.values)
        assert outside.row["noise_edge"] == inside.row["noise_edge"]


@linux
@pytest.mark.parametrize("kind", ["tall", "wide", "float32"])
@pytest.mark.parametrize("rank", [16, 200])
def test_factors_of_a_matrix_on_disk_are_those_of_one_in_memory(tmp_path, kind, rank):
    both = [open_checkpoint(path) for path in _pair(tmp_path, kind)]
    (target,) = select(*both, ["everything"]).chosen
    (piece,) = pieces_of(target)
    (folder := tmp_path / "spilled").mkdir()
    found = []
    for host in (math.inf, 1.0):
        job = FactorsJob(*both, CPU, False, Room(math.inf, host, folder), {target.name: rank}, torch.float32, 0, None)
        delta = job.load(piece)
        assert (mapped(folder) > 0) == (host == 1.0)
        found.append(job.placed(piece, delta)[1])
        del delta
    assert mapped(folder) == 0
    for name, tensor in found[0].items():
        if kind == "wide":  # its Gram matrix is summed in another order
            scale = float(tensor.abs().max())
            torch.testing.assert_close(found[1][name].abs(), tensor.abs(), rtol=1e-4, atol=1e-4 * scale)
        else:
            assert torch.equal(found[1][name], tensor), name


# -------------------------------------------------------------------------------------------------------- how much room


def test_what_a_matrix_takes_grows_with_it_and_less_on_disk():
    large = Footprint((256_000, 2304), 4)
    size = 256_000 * 2304
    assert large.waiting == 8 * size
    assert 16 * size < large.computing <= 25 * size
    assert large.most >= large.loading > large.waiting
    assert large.on_disk < size
    assert Footprint((256_000, 2304), 8).most > 1.5 * large.most
    assert Footprint((256_000, 2304), 4, exact_tail=True).on_disk > 16 * size
    assert Footprint((256_000, 2304), 4, factored=True).most < large.waiting


def _bound(room, device, sizes, on_disk):
    held = Memory(math.inf, lambda size: size, lambda size: size / 2, lambda size: 2.0 * size)
    return room.bound(torch.device(device), sizes, held, lambda _: on_disk, lambda size: f"matrix of {size}")


def test_without_a_bound_there_is_none(tmp_path):
    free = _bound(Room(math.inf, math.inf, tmp_path), "cpu", [5, 3], 1.0)
    assert (free.limit, free.most(5)) == (math.inf, 10.0)


def test_on_the_host_those_on_disk_count_as_what_stays_in_memory(tmp_path):
    memory = _bound(Room(math.inf, 7.0, tmp_path), "cpu", [5, 3], 0.5)
    assert (memory.most(5), memory.most(3)) == (0.5, 6.0)
    assert memory.holds([5, 3])
    assert not memory.holds([3, 3])


def test_one_that_does_not_fit_even_on_disk_is_named(tmp_path):
    room = Room(math.inf, 2e9, tmp_path)
    with pytest.raises(ProbeError, match=r"matrix of 5000000000: needs --memory 3.7GB, found 2.7 GB; .*--exclude"):
        _bound(room, "cpu", [3, 5_000_000_000], 3e9)
    assert _bound(room, "cpu", [3], 3e9) is not None, "in memory it fits"
    assert _bound(Room(8e9, 2e9, tmp_path), "meta", [5_000_000_000], 3e9).limit == 8e9


def test_beside_cards_the_cpu_takes_what_is_too_large_and_what_is_small(tmp_path):
    room = Room(8e9, math.inf, tmp_path)
    assert room.takes((100_000, 4096), 9e9)
    assert not room.takes((100_000, 4096), 7e9)
    assert room.takes((100_000, 512), 7e9)
    assert not room.takes((513, 100_000), 7e9)


def test_room_is_what_was_asked_for_without_what_is_taken_anyway(tmp_path):
    room = find_room(8e9, 20e9, Choice(CPU), tmp_path)
    assert (room.host, room.card, room.folder) == (8e9 - HOST_RESERVE, 20e9 - CARD_RESERVE, tmp_path)
    free = find_room(None, None, Choice(CPU), None)
    assert (free.host, free.card) == (math.inf, math.inf)
    assert free.folder.is_dir()


@pytest.mark.parametrize(("name", "option"), [("--memory", "memory"), ("--gpu-memory", "gpu_memory")])
def test_too_little_is_refused(name, option):
    with pytest.raises(ProbeError, match=f"{name} 500 MB: expected at least 1.5 GB"):
        Options(**{option: 5e8})
    assert getattr(Options(**{option: 1.5e9}), option) == 1.5e9


def test_on_a_cluster_a_card_is_not_shared_out():
    with pytest.raises(ProbeError, match="--gpu-memory with --ray: a task has a GPU for itself"):
        Options(ray="auto", gpu_memory=8e9)
    assert Options(ray="auto", memory=8e9).memory == 8e9


def test_the_cpu_beside_a_card_does_not_wait_for_its_eigen_solver(tmp_path):
    paths = _pair(tmp_path, "tall")
    both = [open_checkpoint(path) for path in paths]
    settings = Settings(torch.device("meta"), Options()).with_turns()
    job = Job(*both, {}, settings, 0.0, Room(math.inf, math.inf, tmp_path))
    assert job.on(torch.device("meta")).settings.turn is not settings.turn
    (pair,) = match(*both, Options()).pairs
    here = job.on(CPU)
    with settings.turn:
        assert here.compute(pair, here.load(pair)).row["n_kept"] == 700


def test_a_high_rank_of_a_long_matrix_takes_its_long_factors(tmp_path):
    both = [open_checkpoint(path) for path in _pair(tmp_path, "tall")]
    (target,) = select(*both, ["everything"]).chosen
    (piece,) = pieces_of(target)

    def on_disk(rank):
        room = Room(math.inf, math.inf, tmp_path)
        return FactorsJob(*both, CPU, False, room, {target.name: rank}, torch.float32, 0, None).on_disk(piece)

    assert on_disk(80) - on_disk(16) > 8 * 4 * 3200 * 64
