"""Preparing Triton, and what is said when it cannot be started; no server runs here."""

import importlib.util
import sys
from pathlib import Path

import pytest

from workers import triton_server
from workers.triton_aftermath import explain_failure, remove_shared_memory
from workers.triton_server import MODEL_REPOSITORY, TritonSetupError, command, find_libpython, find_wheel, prepare

needs_wheel = pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="nvidia-pytriton is not installed")


@needs_wheel
def test_preparing_twice_changes_nothing_and_mends_links(tmp_path: Path) -> None:
    backend = prepare(tmp_path)
    (backend / "python" / "triton_python_backend_stub").unlink()
    (backend / "python" / "triton_python_backend_stub").symlink_to("/nowhere")
    assert prepare(tmp_path) == backend
    assert all(path.exists() for path in tmp_path.rglob("*"))
    assert (tmp_path / "python" / "pyvenv.cfg").read_text().startswith(f"home = {sys.base_prefix}")


@needs_wheel
def test_no_secret_of_the_caller_reaches_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "s3cret")
    _, env = command(MODEL_REPOSITORY, prepare(tmp_path), 1, 2, 3)
    assert "s3cret" not in env.values()


def test_without_the_wheel_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TritonSetupError, match=r"not installed: pip install"):
        find_wheel()


@needs_wheel
def test_without_a_stub_for_this_python_the_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Version(tuple[int, ...]):
        major, minor = 3, 99

    monkeypatch.setattr(triton_server.sys, "version_info", Version((3, 99)))
    with pytest.raises(TritonSetupError, match=r"no Python backend stub for Python 3\.99 \(it has .*3\.11"):
        find_wheel()


def test_without_libpython_the_sentence_says_how_to_get_one(tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    stub.write_bytes(b"\x7fELF\0libpython3.99.so.1.0\0")
    with pytest.raises(TritonSetupError, match=r"libpython3\.99\.so\.1\.0.*not found.*install"):
        find_libpython(stub, tmp_path)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("x: error while loading shared libraries: libfoo.so.1: cannot open shared object file", "libfoo.so.1"),
        ('E1122 20:45:49.07 34 server.cc:241] "CudaDriverHelper has not been initialized."', "without saying why"),
        ("error: creating server: Internal - failed to stat file /m", "failed to stat file /m"),
        ("E1 x.cc:1] \"failed to load 'm' version 1: Internal: Unable: No space left on device\"", "/dev/shm"),
        ("", "without saying why"),
    ],
)
def test_other_failures_are_one_sentence_too(log: str, said: str) -> None:
    assert said in explain_failure(log)


def test_an_empty_prefix_removes_nothing() -> None:
    with pytest.raises(ValueError):
        remove_shared_memory("")
