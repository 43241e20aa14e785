"""Checkpoints by address: what is read over the network, to the byte, and every failure of a server in one clear line.

The servers are on this machine: one of plain HTTP that counts and fails, and fsspec's filesystem in memory.
"""

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pandas as pd
import pytest
import torch
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.memory import MemoryFileSystem
from pairs import add_update, llama_tensors, pair, write, write_sharded
from refusals import refused
from servers import serving
from test_cli import fails, probe

import lowrank_probe as lp
from lowrank_probe import OutputError, fsspec_store, remote_store
from lowrank_probe.checkpoints import Checkpoint, open_checkpoint
from lowrank_probe.fsspec_store import FsspecStore
from lowrank_probe.model_shapes import model_shape
from lowrank_probe.remote_files import RemoteFile, locate, shown
from lowrank_probe.safetensors_headers import read_header

Q = "model.layers.1.self_attn.q_proj.weight"
LLAMA = {
    "model_type": "llama", "vocab_size": 80, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
LOOK = 8  # bytes of a config or an index that are read to see whether it is there


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote_store, "WAITS_S", (0.0, 0.0, 0.0, 0.0))


@pytest.fixture
def memory(tmp_path):
    """A function that copies a directory into fsspec's memory and gives its address."""
    files = fsspec.filesystem("memory")

    def copied(directory):
        for file in directory.iterdir():
            files.pipe(f"/{tmp_path.name}/{directory.name}/{file.name}", file.read_bytes())
        return f"memory://{tmp_path.name}/{directory.name}"

    yield copied
    files.store.clear()


def header_bytes(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def same_tables(one, other):
    pd.testing.assert_frame_equal(one.table.drop(columns="seconds"), other.table.drop(columns="seconds"))


# ---------------------------------------------------------------------------------------------- what is read


def test_the_command_reads_headers_and_the_tensors_asked_for_to_the_byte(tmp_path):
    sides = pair(tmp_path / "www")
    with serving(tmp_path / "www") as server:
        addresses = [f"{server.address}/base", f"{server.address}/tuned/"]
        probe("spectrum", *addresses, "--include", "q_proj", "--device", "cpu", "--out", tmp_path / "run")
        result = lp.load(tmp_path / "run")
    same_tables(result, lp.spectrum(*sides, include=["q_proj"], device="cpu"))
    assert list(result.table["name"]) == [Q.replace("1", "0", 1), Q]
    local = [open_checkpoint(side) for side in sides]
    expected = sum(
        header_bytes(side.path / "model.safetensors")
        + sum(side.tensors[name].n_bytes for name in result.table["name"])
        + (side.path / "config.json").stat().st_size + LOOK
        for side in local
    )  # fmt: skip
    assert server.sent == expected
    tensors = [f"bytes={s.tensors[n].start}-{s.tensors[n].stop - 1}" for s in local for n in result.table["name"]]
    asked = [wanted for _, wanted, _, _ in server.of("model.safetensors")]
    assert sorted(asked) == sorted(
        [
            *tensors,
            *["bytes=0-7"] * 2,
            *(f"bytes=8-{header_bytes(side.path / 'model.safetensors') - 1}" for side in local),
        ]
    )
    assert result.facts["base"]["path"] == addresses[0]
    assert set(result.facts["base"]["files"][0]) == {"name", "n_bytes", "etag", "modified"}


def test_shards_are_read_header_by_header(tmp_path):
    tensors = llama_tensors()
    write_sharded(tmp_path / "m", tensors)
    with serving(tmp_path) as server:
        side = open_checkpoint(f"{server.address}/m")
        assert set(side.tensors) == set(tensors)
        before = server.sent
        assert torch.equal(side.read(Q), tensors[Q])
        assert torch.equal(side.read(Q, span=(48, 96)), tensors[Q].reshape(-1)[48:144])
    assert before == sum(map(header_bytes, (tmp_path / "m").glob("*.safetensors"))) + LOOK + (
        tmp_path / "m" / "model.safetensors.index.json"
    ).stat().st_size  # fmt: skip
    assert server.sent - before == tensors[Q].nbytes + 4 * 96


def test_one_file_by_its_address(tmp_path):
    write(tmp_path / "m", llama_tensors())
    with serving(tmp_path) as server:
        side = open_checkpoint(f"{server.address}/m/model.safetensors")
    assert (str(side.path), side.path.name) == (f"{server.address}/m/model.safetensors", "model.safetensors")
    assert len(server.asked) == 2


def test_any_filesystem_of_fsspec_and_a_local_side(tmp_path, memory):
    sides = pair(tmp_path)
    here = lp.spectrum(*sides, device="cpu")
    addresses = [memory(side) for side in sides]
    same_tables(lp.spectrum(*addresses, device="cpu"), here)
    found = lp.spectrum(sides[0], addresses[1], device="cpu")
    same_tables(found, here)
    assert found.facts["tuned"]["path"] == addresses[1]
    assert locate(f"file://{sides[0]}") == sides[0]


def test_a_filesystem_is_asked_for_large_tensors_in_pieces(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(fsspec_store, "PIECE_BYTES", 1000)
    tensors = llama_tensors()
    side = open_checkpoint(memory(write(tmp_path / "m", tensors)))
    assert all(torch.equal(side.read(name), tensor) for name, tensor in tensors.items())


def test_a_filesystem_with_ranges_of_its_own_is_asked_for_them(tmp_path, memory):
    memory(write(tmp_path / "m", llama_tensors()))
    files = AsyncFileSystemWrapper(fsspec.filesystem("memory"), asynchronous=False)
    file = RemoteFile(FsspecStore(files, f"/{tmp_path.name}/m", "far://m"), "model.safetensors")
    far = Checkpoint(file, read_header(file))
    assert torch.equal(far.read(Q), llama_tensors()[Q])
    far.check_unchanged()


@pytest.mark.parametrize("kind", ["http", "memory"])
def test_threads_read_beside_each_other(tmp_path, memory, kind):
    tensors = llama_tensors(n_layers=6)
    directory = write(tmp_path / "m", tensors)
    with serving(tmp_path) as server, ThreadPoolExecutor(8) as pool:
        side = open_checkpoint(f"{server.address}/m" if kind == "http" else memory(directory))
        read = pool.map(side.read, tensors)
        assert all(torch.equal(one, tensor) for one, tensor in zip(read, tensors.values(), strict=True))


def test_an_adapter_on_a_base(tmp_path):
    base, tuned = pair(tmp_path)
    lp.extract(base, tuned, tmp_path / "adapter", ranks=4)
    here = lp.spectrum(base, tmp_path / "adapter", device="cpu")
    with serving(tmp_path) as server:
        address = f"{server.address}/adapter"
        same_tables(lp.spectrum(f"{server.address}/base", address, device="cpu"), here)
        assert len(lp.spectrum(address, device="cpu").table) == len(here.table)


def test_extraction_and_trajectory(tmp_path, growing):
    base, steps = growing
    with serving(base.parent) as server:
        far = f"{server.address}/base"
        lp.extract(far, f"{server.address}/checkpoint-100", tmp_path / "far", ranks=4)
        lp.extract(base, steps[0], tmp_path / "near", ranks=4)
        moved = lp.trajectory(far, [f"{server.address}/{step.name}" for step in steps], device="cpu")
    assert json.loads((tmp_path / "far" / "adapter_config.json").read_text())["base_model_name_or_path"] == far
    near, there = (open_checkpoint(tmp_path / where) for where in ("near", "far"))
    assert all(torch.equal(near.read(name), there.read(name)) for name in near.tensors)
    assert list(moved.results) == [step.name for step in steps]


def test_the_budget_of_a_model_by_its_address(tmp_path):
    tensors = llama_tensors()
    directory = write(tmp_path / "m", tensors)
    with serving(tmp_path) as server:
        bare = model_shape(f"{server.address}/m")
        assert bare.n_parameters == sum(tensor.numel() for tensor in tensors.values())
        assert server.sent == header_bytes(directory / "model.safetensors")
        server.files["/config/config.json"] = json.dumps(LLAMA).encode()
        stdout, _ = probe("budget", f"{server.address}/config", "--json")
        assert json.loads(stdout)
        refused(f"{server.address}/nothing", "found none of config.json, model.safetensors", act=model_shape)


# ---------------------------------------------------------------------------------------------- failures that pass


@pytest.mark.parametrize("fault", ["drop", "reset", "503", "429"])
def test_what_fails_once_is_tried_again_from_where_it_was(tmp_path, fault):
    tensors = llama_tensors()
    write(tmp_path / "m", tensors)
    with serving(tmp_path, lambda path, number: fault if number in (4, 6) else "") as server:
        side = open_checkpoint(f"{server.address}/m")
        assert all(torch.equal(side.read(name), tensor) for name, tensor in tensors.items())
    whole = header_bytes(tmp_path / "m" / "model.safetensors") + sum(W.nbytes for W in tensors.values())
    if fault == "drop":  # nothing that arrived is asked for again, but for the few bytes of the first look
        assert server.sent <= whole + LOOK


class Failing(MemoryFileSystem):
    """The filesystem in memory, where the next `errors` are raised before anything is read."""

    protocol, cachable, errors = "failing", False, ()

    def cat_file(self, *args, **options):
        if self.errors:
            error, *self.errors = self.errors
            raise error
        return super().cat_file(*args, **options)


def test_a_filesystem_that_fails_is_asked_again(tmp_path, memory):
    memory(write(tmp_path / "m", llama_tensors()))
    files = Failing()
    file = RemoteFile(FsspecStore(files, f"/{tmp_path.name}/m", "far://m"), "model.safetensors")
    side = Checkpoint(file, read_header(file))
    files.errors = [ConnectionResetError("reset"), TimeoutError(), RuntimeError("of some library")]
    assert torch.equal(side.read(Q), llama_tensors()[Q])
    files.errors = [RuntimeError("of some library")] * 5
    refused(
        side, "far://m/model.safetensors: cannot be read", "of some library", "5 tries", act=lambda one: one.read(Q)
    )
    files.errors = [PermissionError("not yours")]
    refused(side, "access is denied (not yours)", "credentials", act=lambda one: one.read(Q))


def test_a_run_goes_on_after_a_broken_connection(tmp_path):
    sides = pair(tmp_path)
    with serving(tmp_path, lambda path, number: "drop" if number % 3 == 0 and "model.safetensors" in path else "") as s:
        same_tables(
            lp.spectrum(f"{s.address}/base", f"{s.address}/tuned", device="cpu"), lp.spectrum(*sides, device="cpu")
        )


@pytest.mark.parametrize(
    ("fault", "words"),
    [("503", ("answers 503", "5 tries", "try again")), ("drop", ("the answer ended at byte", "5 tries"))],
)
def test_what_keeps_failing_is_one_line(tmp_path, fault, words):
    write(tmp_path / "m", llama_tensors())
    with serving(tmp_path, lambda path, number: fault if number >= 4 else "") as server:
        message = refused(f"{server.address}/m", *words)
    assert message.startswith(f"{server.address}/m/model.safetensors: cannot be read: ")


def test_a_server_that_is_not_there():
    refused("http://127.0.0.1:9/m", "http://127.0.0.1:9/m/adapter_config.json", "cannot be reached", "refused")


# ---------------------------------------------------------------------------------------------- failures that stay


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("whole", ("has no range requests", "download it", "nginx")),
        (
            "404",
            ("found none of model.safetensors.index.json, model.safetensors", "is that the address of a directory"),
        ),
        ("401", ("answers 401", "https://user:password@")),
        ("403", ("answers 403", "signed")),
        ("500", ("answers 500", "5 tries")),
        ("418", ("answers 418", "download it")),
    ],
)
def test_what_a_server_answers_instead(tmp_path, fault, words):
    write(tmp_path / "m", llama_tensors())
    with serving(tmp_path, lambda path, number: fault) as server:
        refused(f"{server.address}/m", server.address, *words)


def test_object_stores_call_forbidden_what_is_not_there(tmp_path):
    write(tmp_path / "m", llama_tensors())
    with serving(tmp_path, lambda path, number: "" if path.endswith("/model.safetensors") else "403") as server:
        assert len(open_checkpoint(f"{server.address}/m").tensors) == len(llama_tensors())


def test_a_config_needs_no_ranges(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with serving(tmp_path, lambda path, number: "whole") as server:
        assert model_shape(server.address).n_layers == 2


@pytest.mark.parametrize("address", ["http://[::1/m", "http://127.0.0.1:port/m"])
def test_what_is_no_address(address):
    refused(address, address, "is no valid address")


def test_other_bytes_than_asked_for(tmp_path):
    write(tmp_path / "m", llama_tensors())
    with serving(tmp_path, lambda path, number: "other" if number == 4 else "") as server:
        refused(f"{server.address}/m", "asked for bytes 8-", "its server answers with 7-")


@pytest.mark.parametrize("what", ["etag", "longer", "shorter", "gone"])
def test_a_file_that_changes_while_it_is_read(tmp_path, what):
    write(tmp_path / "m", llama_tensors())
    with serving(tmp_path) as server:
        side = open_checkpoint(f"{server.address}/m")
        name, body = "/m/model.safetensors", server.files["/m/model.safetensors"]
        changed = {"etag": bytes(len(body)), "longer": body + b"0", "shorter": body[:1200], "gone": None}[what]
        server.files[name] = changed
        words = {"etag": "its etag was", "gone": "it is gone"}.get(what, f"{len(body)} bytes before")
        refused(side, "changed while it was read", words, act=lambda one: one.read(Q))


def test_without_marks_only_the_size_can_tell(tmp_path):
    write(tmp_path / "m", llama_tensors())
    with serving(tmp_path) as server:
        server.marks = False
        side = open_checkpoint(f"{server.address}/m")
        assert torch.equal(side.read(Q), llama_tensors()[Q])
        server.files["/m/model.safetensors"] += b"0"
        refused(side, "bytes before", act=lambda one: one.read(Q))


def test_a_filesystem_is_asked_again_when_all_is_read(tmp_path, memory):
    sides = pair(tmp_path)
    addresses = [memory(side) for side in sides]
    again = [False]

    def overwrite(name, done, total):
        if not again[0]:
            memory(sides[1])
            again[0] = True

    def run(address):
        return lp.spectrum(addresses[0], address, device="cpu", on_progress=overwrite)

    refused(addresses[1], "changed while it was read", "its modified was", act=run)
    side = open_checkpoint(addresses[1])
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/tuned/model.safetensors", b"short")
    refused(side, "got 0 of 12288", act=lambda one: one.read(Q))
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}/tuned/model.safetensors")
    refused(side, "no such file", act=lambda one: one.read(Q))
    refused(addresses[1], "found none of")


def stop_after(count):
    """Progress that fails once so many matrices are finished."""
    told = []

    def on_progress(*one):
        told.append(one)
        if len(told) == count:
            raise RuntimeError("in the middle")

    return on_progress


def test_a_resumed_run_wants_the_same_files(tmp_path):
    pair(tmp_path)
    with serving(tmp_path) as server:
        sides = f"{server.address}/base", f"{server.address}/tuned"
        expected = lp.spectrum(*sides, device="cpu")
        with pytest.raises(RuntimeError, match="in the middle"):
            lp.spectrum(*sides, device="cpu", out=tmp_path / "run", on_progress=stop_after(4))
        before = server.sent
        write(tmp_path / "other", add_update(llama_tensors(), seed=9), {"model_type": "llama"})
        whole = server.files["/tuned/model.safetensors"]
        server.files["/tuned/model.safetensors"] = (tmp_path / "other" / "model.safetensors").read_bytes()
        with pytest.raises(OutputError, match=r"another run \(tuned\.files"):
            lp.spectrum(*sides, device="cpu", out=tmp_path / "run")
        assert server.sent - before < 5000  # headers only
        server.files["/tuned/model.safetensors"] = whole
        before = server.sent
        same_tables(lp.spectrum(*sides, device="cpu", out=tmp_path / "run"), expected)
        assert server.sent - before < before / 2


def test_without_marks_a_killed_run_is_not_gone_on_with(tmp_path):
    pair(tmp_path)
    with serving(tmp_path) as server:
        server.marks = False
        sides = f"{server.address}/base", f"{server.address}/tuned"
        with pytest.raises(RuntimeError, match="in the middle"):
            lp.spectrum(*sides, device="cpu", out=tmp_path / "run", on_progress=stop_after(4))
        with pytest.raises(OutputError, match=r"another run \(run:"):
            lp.spectrum(*sides, device="cpu", out=tmp_path / "run")


# ---------------------------------------------------------------------------------------------- addresses


def test_what_is_secret_in_an_address_goes_to_the_server_alone(tmp_path):
    pair(tmp_path)
    with serving(tmp_path) as server:
        host = server.address.removeprefix("http://")
        base, tuned = (f"http://me:pass%40word@{host}/{side}?sig=abc" for side in ("base", "tuned"))
        result = lp.spectrum(base, tuned, device="cpu")
        assert all(path.endswith("?sig=abc") for path, _ in server.headers)
        assert {headers["Authorization"] for _, headers in server.headers} == {"Basic bWU6cGFzc0B3b3Jk"}
        server.files.clear()
        message = refused(tuned)
    for text in (json.dumps(result.facts), message):
        assert "pass" not in text
        assert "sig=" not in text
    assert result.facts["tuned"]["path"] == f"{server.address}/tuned"
    assert shown("hf://org/name@main") == "hf://org/name@main"


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_protocol_whose_package_is_missing():
    refused("s3://bucket/model", "s3://", "pip install s3fs")


def test_a_protocol_that_there_is_not():
    refused("nonsense://bucket/model", "nonsense://", "expected an address such as https://")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_other_formats_are_read_from_a_disk(tmp_path, name):
    (tmp_path / name).write_bytes(b"0" * 100)
    with serving(tmp_path) as server:
        refused(f"{server.address}/{name}", "only safetensors can be read tensor by tensor", "download it")
        if name.endswith(".bin"):
            refused(server.address, f"{server.address}/{name}: over a network only safetensors")


def test_what_needs_whole_files_says_so(tmp_path):
    address, text = "http://127.0.0.1:9/m", "this needs whole files on this machine"
    refused(address, text, act=lambda one: lp.merge(one, "adapter", tmp_path / "out"))
    refused(address, text, act=lambda one: lp.resize(one, tmp_path / "out", rank=1))
    refused(address, text, act=lambda one: lp.verify("base", one, "adapter"))
    (tmp_path / "text.txt").write_text("A text.\n")
    refused(address, text, act=lambda one: lp.evaluate("base", one, tmp_path / "text.txt"))
    fails("extract", "base", address, "--verify", "--out", tmp_path / "out", words=(text,))
