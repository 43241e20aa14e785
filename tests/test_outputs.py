"""Output directories: exclusive, whole or absent, and every refusal in words that say what is the case."""

import errno
import os
import platform
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from builders import build
from mounts import mounted

from lowrank_probe import OutputError, outputs
from lowrank_probe.unfinished import Unfinished

# ---------------------------------------------------------------------------------------------- whose directory


def test_a_taken_name_gets_the_next_free_suffix(tmp_path):
    (tmp_path / "runs" / "a-2").mkdir(parents=True)
    found = []
    for _ in range(3):
        with outputs.new_directory(tmp_path / "runs" / "a") as root:
            (root / "file").write_text("mine")
            found.append(root.name)
    assert found == ["a", "a-3", "a-4"]
    assert list((tmp_path / "runs" / "a-2").iterdir()) == []


def test_directories_asked_for_at_once_are_all_different(tmp_path):
    together = threading.Barrier(8)

    def ask(number):
        together.wait()
        with outputs.new_directory(tmp_path / "runs" / "a") as root:
            (root / str(number)).touch()
            together.wait()
            return root

    with ThreadPoolExecutor(8) as pool:
        roots = list(pool.map(ask, range(8)))
    assert len(set(roots)) == 8
    assert [[file.name for file in root.iterdir()] for root in roots] == [[str(n)] for n in range(8)]


def test_writers_of_one_directory_do_not_share_temporary_names(tmp_path):
    together = threading.Barrier(2)

    def write(number):
        def content(path):
            path.write_text(number * 1000)
            together.wait()  # both have their file aside before either renames or cleans up

        return outputs.write_directory(tmp_path / "run", {"a": content, "b": content})

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, "12")) == [tmp_path / "run"] * 2
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["a", "b"]
    assert {(tmp_path / "run" / name).read_text() for name in "ab"} <= {"1" * 1000, "2" * 1000}


# ---------------------------------------------------------------------------------------------- nothing stays


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("bug")], ids=repr)
def test_a_failed_write_removes_the_parents_that_it_made(tmp_path, failure):
    def fail(path):
        path.write_text("half")
        raise failure

    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)):
        outputs.write_directory(tmp_path / "there" / "a" / "b" / "run", {"first": Path.touch, "second": fail})
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_parent_that_got_something_else_meanwhile_stays(tmp_path):
    def fail(path):
        (tmp_path / "a" / "other").touch()
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OutputError, match="disk is full"):
        outputs.write_directory(tmp_path / "a" / "run", {"file": fail})
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "other"]


def test_a_new_directory_that_stays_empty_is_removed_with_its_parents(tmp_path):
    with outputs.new_directory(tmp_path / "runs" / "a") as root:
        assert list(root.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_filled_and_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with outputs.whole_directory(tmp_path / "link") as aside:
        (aside / "file").write_text("here")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "here"
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


@pytest.mark.parametrize("ask", [outputs.check_free, lambda out: Unfinished(out, {}), outputs.check_writable])
def test_a_link_to_nothing_is_called_that(tmp_path, ask):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OutputError, match=r"link: is a link to nowhere, which is not there; choose another --out$"):
        ask(tmp_path / "link")


@pytest.mark.parametrize("ask", [outputs.check_free, lambda out: Unfinished(out, {}), outputs.check_name])
def test_a_name_that_is_no_text_is_refused_in_one_line(tmp_path, ask):
    with pytest.raises(OutputError, match=r"r\\xff: its name is not UTF-8 .*; rename it, or give a link to it$"):
        ask(tmp_path / os.fsdecode(b"r\xff"))
    assert not any(tmp_path.iterdir())


def test_what_a_killed_process_was_writing_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for number in (gone.pid, os.getppid()):
        (tmp_path / f".part-{platform.node()}-{number}-xyz").mkdir()
    outputs.check_free(tmp_path)
    outputs.write_directory(tmp_path, {"file": lambda path: path.write_text("here")})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"file", f".part-{platform.node()}-{os.getppid()}-xyz"}


# ---------------------------------------------------------------------------------------------- said in own words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "no permission to write there; elsewhere"),
        (errno.EPERM, "no permission to write there; elsewhere"),
        (errno.EROFS, "the file system is read-only; elsewhere"),
        (errno.ENOSPC, "the disk is full; free some space or elsewhere"),
        (errno.EDQUOT, "the disk quota is used up; free some space or elsewhere"),
        (errno.EFBIG, "larger than a file may be here; raise the limit (ulimit -f) or elsewhere"),
        (errno.ENAMETOOLONG, "File name too long; elsewhere"),
    ],
)
def test_every_refusal_has_its_own_words(number, words):
    assert outputs.why(OSError(number, os.strerror(number)), "elsewhere") == words


def test_an_error_without_a_number_keeps_its_text():
    assert outputs.why(OSError("no such engine"), "elsewhere") == "no such engine; elsewhere"


@pytest.fixture
def locked():
    """A directory where this process may not write; root takes another user's place for it."""
    with tempfile.TemporaryDirectory() as name:
        root, is_root = Path(name), os.geteuid() == 0
        root.chmod(0o755)
        (root / "locked").mkdir(mode=0o555)
        if is_root:
            os.seteuid(65534)
        try:
            yield root / "locked"
        finally:
            if is_root:
                os.seteuid(0)


def refusals(directory):
    """What the check before the work and the write after it say, without the path."""
    result = build(layers=1, types=("q",))
    for act in (outputs.check_free, result.save):
        for path in (directory, directory / "a" / "run"):
            with pytest.raises(OutputError) as caught:
                act(path)
            assert "\n" not in str(caught.value)
            yield str(caught.value)


def test_no_permission_is_not_called_a_lack_of_space(locked):
    for said in refusals(locked):
        assert said.startswith(str(locked))
        assert said.endswith("no permission to write there; choose another --out")
        assert "space" not in said


def test_a_read_only_file_system_is_called_that(tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        for said in refusals(disk):
            assert said.endswith("the file system is read-only; choose another --out")
