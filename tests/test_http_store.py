"""Requests to a plain HTTP server: connections that are kept, proxies, redirects, certificates.

The servers are on this machine.
"""

import shutil
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pairs import llama_tensors, pair, write
from refusals import refused
from servers import serving
from test_cli import ENVIRONMENT, PROBE
from test_imports import python

from lowrank_probe import remote_store
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.http_connections import MAX_REDIRECTS
from lowrank_probe.remote_files import locate, read_span


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote_store, "WAITS_S", (0.0, 0.0, 0.0, 0.0))


# ---------------------------------------------------------------------------------------------- connections


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_need_a_connection_each(tmp_path, threads):
    tensors = llama_tensors(n_layers=6)
    write(tmp_path / "m", tensors)
    with serving(tmp_path) as server, ThreadPoolExecutor(threads) as pool:
        side = open_checkpoint(f"{server.address}/m")
        for _ in range(3):
            assert all(map(torch.equal, pool.map(side.read, tensors), tensors.values()))
    assert len(server.asked) > 3 * len(tensors)
    assert len(server.connections) <= threads


def test_a_look_at_what_is_not_there_leaves_the_connection_to_the_next(tmp_path):
    write(tmp_path / "m", llama_tensors())
    with serving(tmp_path, lambda path, number: "503" if number == 3 else "") as server:
        open_checkpoint(f"{server.address}/m")
    assert {status for _, _, status, _ in server.asked} == {206, 404, 503}
    assert len(server.connections) == 1


def test_a_connection_that_the_server_closed_meanwhile_is_opened_anew(tmp_path):
    tensors = llama_tensors()
    write(tmp_path / "m", tensors)
    with serving(tmp_path) as server:
        side = open_checkpoint(f"{server.address}/m")
        for name, tensor in tensors.items():
            server.hang_up()
            assert torch.equal(side.read(name), tensor)
    assert len(server.connections) == 1 + len(tensors)


def test_what_is_not_read_to_its_end_is_not_mixed_with_what_comes_next(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 4096)
    with serving(tmp_path) as server:
        file = locate(f"{server.address}/a.bin")
        span = file.store.span(file.path, 0, 1 << 20)
        assert span.readinto(memoryview(bytearray(10))) == 10
        span.close()
        assert read_span(file, 256, 260) == bytes(range(4))


def test_a_pickled_store_and_a_forked_process_have_connections_of_their_own(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    with serving(tmp_path) as server:
        # Another process has no other threads, which a fork would lose.
        python(f"""
import os, pickle
from lowrank_probe.remote_files import locate, read_span
file = locate("{server.address}/a.bin")
assert read_span(file, 10, 20) == bytes(range(10, 20))
child = os.fork()
assert read_span(file, 20, 30) == bytes(range(20, 30))
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert read_span(pickle.loads(pickle.dumps(file)), 30, 40) == bytes(range(30, 40))
""")
    assert len(server.asked) == 5
    assert len(server.connections) == 2


def test_a_run_on_this_disk_imports_no_client(tmp_path):
    base, tuned = pair(tmp_path)
    python(f"""
import sys
import lowrank_probe as lp
lp.spectrum({str(base)!r}, {str(tuned)!r}, device="cpu")
assert "urllib3" not in sys.modules
""")


# ---------------------------------------------------------------------------------------------- proxies, redirects


def test_proxies_are_the_environments(tmp_path, monkeypatch):
    tensors = llama_tensors()
    write(tmp_path / "m", tensors)
    with serving(tmp_path) as server:
        host = server.address.removeprefix("http://")
        monkeypatch.setenv("http_proxy", f"http://me:pass%40word@{host}")
        side = open_checkpoint("http://models.invalid/m")
        assert all(torch.equal(side.read(name), tensor) for name, tensor in tensors.items())
        assert all(path.startswith("http://models.invalid/m/") for path, _ in server.headers)
        assert {headers["proxy-authorization"] for _, headers in server.headers} == {"Basic bWU6cGFzc0B3b3Jk"}
        assert len(server.connections) == 1
        monkeypatch.setenv("http_proxy", host)  # as curl takes it
        assert open_checkpoint("http://models.invalid/m").tensors
        monkeypatch.setenv("no_proxy", "127.0.0.1,models.invalid")
        refused("http://models.invalid/m", "http://models.invalid/m/", "its server cannot be reached")
        assert open_checkpoint(f"{server.address}/m").tensors


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://me:secret@127.0.0.1:9", "unsupported scheme socks5"),
        ("http://127.0.0.1:port", "or its proxy's is none"),
        ("127.0.0.1:9", "cannot be reached"),
    ],
)
def test_a_proxy_that_cannot_be_used(monkeypatch, proxy, words):
    monkeypatch.setenv("http_proxy", proxy)
    assert "secret" not in refused("http://models.invalid/m", "http://models.invalid/m/", words)


def test_redirects_are_followed_without_the_password(tmp_path):
    tensors = llama_tensors()
    write(tmp_path / "there", tensors)
    with serving(tmp_path) as far:

        def before(path, number):
            name = path.rpartition("/")[2]
            return f"/once/{name}" if path.startswith("/m/") else f"{far.address}/there/{name}?sig=abc"

        with serving(tmp_path / "there", before) as near:
            side = open_checkpoint(near.address.replace("://", "://me:secret@") + "/m")
            assert all(torch.equal(side.read(name), tensor) for name, tensor in tensors.items())
    assert next(headers.get("Authorization") for path, headers in near.headers if path.startswith("/m/"))
    assert not any("Authorization" in headers for path, headers in near.headers if path.startswith("/once/"))
    assert not any("Authorization" in headers for _, headers in far.headers)
    assert all(path.endswith("?sig=abc") for path, _ in far.headers)
    assert len(near.connections) == len(far.connections) == 1


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ("/m/adapter_config.json", "its server answers 302 Found; download it"),
        ("ftp://127.0.0.1/m", "Not supported URL scheme ftp"),
        ("http://127.0.0.1:port/m?sig=abc", "redirects to none"),
        ("http://[::1/m", "redirects to none"),
    ],
)
def test_redirects_that_lead_nowhere(tmp_path, there, words):
    with serving(tmp_path, lambda path, number: there) as server:
        assert "sig" not in refused(f"{server.address}/m", f"{server.address}/m/", words)
    assert len(server.asked) <= MAX_REDIRECTS + 1


# ---------------------------------------------------------------------------------------------- certificates


@pytest.fixture
def certified(tmp_path):
    """A certificate of this machine's, with its key in one file, that no system trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    file = tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", file,
         "-out", tmp_path / "public.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    file.write_text(file.read_text() + (tmp_path / "public.pem").read_text())
    return file


def test_certificates_are_checked(tmp_path, certified):
    write(tmp_path / "m", llama_tensors())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certified)
    with serving(tmp_path / "m", context=context) as server:
        message = refused(server.address, "CERTIFICATE_VERIFY_FAILED", "self-signed certificate")
        assert message.startswith(f"{server.address}/adapter_config.json: ")
        assert "tries" not in message, "no second try helps"
        command = [PROBE, "spectrum", server.address, server.address, "--device", "cpu", "--out", tmp_path / "run"]
        trusting = {**ENVIRONMENT, "SSL_CERT_FILE": str(tmp_path / "public.pem"), "no_proxy": "127.0.0.1"}
        done = subprocess.run(command, env=trusting, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert len(server.asked) > 20
