"""Hub ids: what may be one, what is downloaded, and what is said where it cannot be.

The hub is a server of our own on this machine, as far as the client asks for it.
"""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from pairs import llama_tensors, write
from refusals import refused

from lowrank_probe import hub
from lowrank_probe.checkpoints import open_checkpoint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True), ("org/name@main", True), ("org/na.me-7B@refs/pr/1", True), ("name", False),
        ("./org/name", False), ("/org/name", False), ("a/b/c", False), ("org/name/", False), ("org/na me", False),
    ],
)  # fmt: skip
def test_what_may_be_a_hub_id(text, expected):
    assert hub.is_hub_id(text) == expected


def test_a_hub_id_offline_says_so_and_a_path_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    code = "import lowrank_probe as lp; lp.spectrum('nobody/nothing', 'nobody/nothing2')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "nobody/nothing2: no such file or directory here, and the hub cannot be reached" in done.stderr
    write(tmp_path / "nobody" / "nothing", llama_tensors())
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("nobody/nothing").notes == ()


def test_a_snapshot_in_the_hubs_cache_is_used_and_said(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    tensors = llama_tensors()
    write(snapshot, tensors, {"model_type": "llama"})
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    code = (
        "from lowrank_probe.checkpoints import open_checkpoint\n"
        "side = open_checkpoint('org/name'); print(len(side.tensors), side.notes[0])"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert done.stdout.startswith(f"{len(tensors)} org/name is no path here: taken from the hub (snapshot 000000000000")


# ---------------------------------------------------------------------------------------------- downloads


@contextmanager
def serving(files, fault=""):
    """A hub with one repository, org/name, of these files (name → bytes); yields (its address, the files asked for,
    each with the range of bytes where one was given).

    fault: "refuse" answers 403 for weights, "break" closes the connection inside them.
    """
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/org/name/tree/"):
                listed = [{"type": "file", "path": name, "size": len(content), "oid": digest(content)}
                          for name, content in files.items()]  # fmt: skip
                self.answer(200, json.dumps(listed).encode())
            elif path.startswith("/api/models/org/name"):
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, json.dumps({"id": "org/name", "sha": "a" * 40, "siblings": siblings}).encode())
            elif path.startswith("/org/name/resolve/"):
                name = path.rpartition("/")[2]
                weights = "." in name and not name.endswith(".json")
                span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                if self.command == "GET":
                    asked.append(f"{name} {span[0]}" if span else name)
                content = files[name][int(span[1]) : int(span[2]) + 1] if span else files[name]
                broken = weights and self.command == "GET" and fault
                status = 403 if broken == "refuse" else 206 if span else 200
                self.answer(status, content, half=broken == "break")
            else:
                self.answer(404, b"")

        def answer(self, status, content, half=False):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", f'"{digest(content)}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: len(content) // 2] if half else content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def digest(content):
    return hashlib.sha1(content).hexdigest()


def opened(address, home, cwd, source="org/name", then=""):
    """What opening org/name says, in a process of its own; `then` is done with the `side`."""
    code = (
        "import lowrank_probe as lp\n"
        "from lowrank_probe.checkpoints import open_checkpoint\n"
        f"try: side = open_checkpoint({source!r}); print(len(side.tensors), sorted({{f.name for f in side.files}}))"
        f"{then}\n"
        "except lp.CheckpointError as error: print(error)"
    )
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment, check=True
    )
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


@pytest.fixture
def content(tmp_path):
    """Files of a repository: a model in safetensors and as a pickle."""
    tensors = llama_tensors()
    write(tmp_path / "made", tensors, {"model_type": "llama"})
    torch.save(tensors, tmp_path / "made" / "pytorch_model.bin")
    return {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}


def test_only_the_model_itself_is_downloaded(tmp_path, content):
    weights = content["model.safetensors"]
    files = content | {"consolidated.safetensors": weights, "model.fp16.safetensors": weights, "README.md": b"#"}
    with serving(files) as (address, asked):
        assert opened(address, tmp_path / "home", tmp_path) == f"{len(llama_tensors())} ['model.safetensors']"
    assert sorted(asked) == ["config.json", "model.safetensors"]


def test_pickles_are_taken_where_there_are_no_safetensors(tmp_path, content):
    del content["model.safetensors"]
    with serving(content) as (address, asked):
        assert opened(address, tmp_path / "home", tmp_path) == f"{len(llama_tensors())} ['pytorch_model.bin']"
    assert sorted(asked) == ["config.json", "pytorch_model.bin"]


def test_a_repository_without_weights(tmp_path):
    with serving({"config.json": b"{}", "model.onnx": b"x"}) as (address, _):
        assert "org/name: its repository on the hub holds no model.safetensors" in opened(
            address, tmp_path / "home", tmp_path
        )


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refuse", "break"])
def test_a_download_that_breaks_off(tmp_path, content, fault):
    with serving(content, fault) as (address, _):
        said = opened(address, tmp_path / "home", tmp_path)
    assert said.startswith("org/name: its download broke off (")
    assert "offline" not in said


def test_a_cache_that_cannot_be_written(tmp_path, content):
    (tmp_path / "home").write_text("a file")
    with serving(content) as (address, _):
        said = opened(address, tmp_path / "home", tmp_path)
    assert said.startswith("org/name: cannot be kept in the hub's cache")
    assert "HF_HOME" in said
    assert "offline" not in said


def test_an_hf_address_reads_headers_and_single_tensors(tmp_path):
    tensors = llama_tensors()
    directory = write(tmp_path / "m", tensors, {"model_type": "llama"})
    with serving({file.name: file.read_bytes() for file in directory.iterdir()}) as (address, asked):
        name = "model.norm.weight"
        then = f"; side.check_unchanged(); print(side.path, len(side.read({name!r})))"
        said = opened(address, tmp_path / "hub", tmp_path, "hf://org/name@main", then)
    assert said == f"{len(tensors)} ['model.safetensors']\nhf://org/name@main 48"
    info = open_checkpoint(directory).tensors[name]
    header = 8 + int.from_bytes((directory / "model.safetensors").read_bytes()[:8], "little")
    spans = ["0-7", f"8-{header - 1}", f"{info.start}-{info.stop - 1}"]
    assert asked == ["config.json", *(f"model.safetensors bytes={span}" for span in spans)]


# ---------------------------------------------------------------------------------------------- what is no hub id


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", ("'' is no path", "empty variable")),
        ("https://huggingface.co/org/name", ("https://huggingface.co/org/name: ", "give the hub id, org/name")),
        ("https://huggingface.co/org/name/tree/v2", ("give the hub id, org/name@v2",)),
        ("https://example.org/model.bin", ("over a network only safetensors", "download it")),
        ("no_such_model", ("no such file or directory", "owner/name")),
    ],
)
def test_what_is_neither_path_nor_hub_id(source, words):
    refused(source, *words)
