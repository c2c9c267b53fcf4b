"""How to start the Triton Inference Server of the wheel `nvidia-pytriton`, without Docker and without a GPU.

Pure preparation: `prepare` lays out the folders, `command` gives argv and environment, and a supervisor starts them.
`workers.triton_aftermath` explains a failed start and clears what a killed server leaves behind.

The wheel carries `pytriton/tritonserver/bin/tritonserver`, the Python backend and one stub executable for each Python
version. The stub embeds Python, so it needs this interpreter's libpython, standard library and numpy.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from workers.triton_aftermath import STUB

INSTALL_HINT = "pip install 'nearloop[triton]', or point --triton at a server that exists"
MODEL_REPOSITORY = Path(__file__).parent / "models"
# Linked in this order: the stub last, because its presence is what says that the folder is complete.
_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")
# What Triton and the stub may see of the caller's environment: nothing that could hold a secret.
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "TZ")
_SHM_REGION_BYTES = 1 << 20  # the least that the Python backend accepts for each model instance


class TritonSetupError(Exception):
    """Triton cannot be started here; the text is one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """Where the installed `nvidia-pytriton` keeps its parts."""

    server: Path  # the executable
    backend: Path  # folder of the Python backend
    stub: Path  # the stub executable for this Python version
    libraries: Path  # folder of the shared libraries that the wheel vendors


def find_wheel() -> Wheel:
    """The installed wheel's parts. Raises TritonSetupError when it or the stub for this Python version is missing."""
    try:
        spec = importlib.util.find_spec("pytriton")  # found, not imported: importing it costs a second
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise TritonSetupError(f"nvidia-pytriton, which carries Triton, is not installed: {INSTALL_HINT}")
    package = Path(next(iter(spec.submodule_search_locations)))
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = root / "python_backend_stubs"
    wheel = Wheel(
        root / "bin" / "tritonserver",
        root / "backends" / "python",
        stubs / version / STUB,
        package.parent / "nvidia_pytriton.libs",
    )
    if not wheel.server.is_file():
        raise TritonSetupError(f"nvidia-pytriton holds no tritonserver at {wheel.server}: reinstall it ({INSTALL_HINT})")
    if not wheel.stub.is_file():
        have = ", ".join(sorted(path.name for path in stubs.glob("3.*"))) or "none"
        raise TritonSetupError(
            f"nvidia-pytriton has no Python backend stub for Python {version} (it has {have}): "
            "make the virtualenv with one of those, or point --triton at a server that exists"
        )
    return wheel


def find_libpython(stub: Path, libraries: Path) -> Path:
    """The folder with the libpython that `stub` links to, this interpreter's own first. Raises TritonSetupError."""
    match = re.search(rb"libpython3[\w.-]*\.so[\w.]*", stub.read_bytes())
    if match is None:
        raise TritonSetupError(f"{stub} names no libpython: reinstall nvidia-pytriton")
    name = match.group().decode()
    libdir = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    folders = [
        libdir,
        libdir / (sysconfig.get_config_var("MULTIARCH") or ""),
        Path(sys.base_prefix) / "lib",
        libraries,  # the wheel vendors the library of its newest Python
    ]
    for folder in folders:
        if (folder / name).exists():
            return folder
    if found := _from_linker_cache(name):
        return found.parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise TritonSetupError(
        f"{name}, which Triton's Python backend needs, was not found in {libdir}: install a Python {version} with a "
        f"shared library (Debian: libpython{version}, pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared, or uv python)"
    )


def _from_linker_cache(name: str) -> Path | None:
    try:
        listing = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rf"^\s*{re.escape(name)} .*=> (\S+)$", listing, re.MULTILINE)
    return Path(match.group(1)) if match else None


def prepare(state_dir: Path) -> Path:
    """Lay out `state_dir`/backends (links into the wheel) and `state_dir`/python; return the backend directory.

    May be called again and after an upgrade: links that point elsewhere are replaced.
    Raises TritonSetupError when a part is missing.
    """
    wheel = find_wheel()
    find_libpython(wheel.stub, wheel.libraries)
    backend_dir = state_dir.absolute() / "backends"
    folder = backend_dir / "python"
    folder.mkdir(parents=True, exist_ok=True)
    for source in [*(wheel.backend / name for name in _BACKEND_FILES), wheel.stub]:
        if not source.is_file():
            raise TritonSetupError(f"nvidia-pytriton holds no {source}: reinstall it ({INSTALL_HINT})")
        link = folder / source.name
        if link.is_symlink() and Path(os.readlink(link)) == source:
            continue
        _link(link, source)
    _lay_out_python(state_dir.absolute())
    return backend_dir


def _lay_out_python(state_dir: Path) -> None:
    """A virtualenv of three files, which is how the stub gets its modules.

    The stub embeds Python in isolated mode, so PYTHONHOME and PYTHONPATH are ignored; what it does look at is the
    `pyvenv.cfg` next to the first `python3` on PATH, and the `.pth` files of that virtualenv.
    """
    numpy = importlib.util.find_spec("numpy")
    if numpy is None or numpy.origin is None:
        raise TritonSetupError("numpy, which the models need, is not installed: pip install numpy")
    root = state_dir / "python"
    site_packages = root / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for folder in (root / "bin", site_packages):
        folder.mkdir(parents=True, exist_ok=True)
    _link(root / "bin" / "python3", Path(sys.executable).resolve())
    _write(root / "pyvenv.cfg", f"home = {sys.base_prefix}/bin\ninclude-system-site-packages = false\n")
    paths = dict.fromkeys([str(Path(numpy.origin).parents[1]), str(Path(__file__).absolute().parents[1])])
    # No bytecode is written: the model repository may be read-only, and stays clean.
    _write(site_packages / "nearloop.pth", "\n".join([*paths, "import sys; sys.dont_write_bytecode = True"]) + "\n")


def _link(link: Path, target: Path) -> None:
    """Atomic, so that two starts at once do not disturb each other."""
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.symlink_to(target)
    fresh.replace(link)


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(path)


def command(
    model_repository: Path,
    backend_dir: Path,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    *,
    shm_prefix: str = "nearloop",
) -> tuple[list[str], dict[str, str]]:
    """Argv and the whole environment for a Triton on the loopback that serves every model of `model_repository`.

    The server exits when a model fails to load, and is ready only when all are. Its shared memory is named
    `shm_prefix`...: use a prefix of your own for each server and `remove_shared_memory` after it is gone.
    """
    wheel = find_wheel()
    argv = [
        str(wheel.server),
        f"--model-repository={model_repository}",
        f"--backend-directory={backend_dir}",
        # explicit configurations: the automatic completion would start every model's stub twice
        "--disable-auto-complete-config",
        "--exit-on-error=true",
        "--strict-readiness=true",
        "--exit-timeout-secs=3",
        "--http-address=127.0.0.1",
        f"--http-port={http_port}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc_port}",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={metrics_port}",
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        f"--backend-config=python,shm-default-byte-size={_SHM_REGION_BYTES}",
        f"--backend-config=python,shm-growth-byte-size={_SHM_REGION_BYTES}",
        "--backend-config=python,stub-timeout-seconds=30",
    ]
    return argv, _environment(wheel, backend_dir.parent / "python" / "bin")


def _environment(wheel: Wheel, python_bin: Path) -> dict[str, str]:
    env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    libraries = dict.fromkeys([str(find_libpython(wheel.stub, wheel.libraries)), str(wheel.libraries)])
    return env | {
        "PATH": f"{python_bin}:{env.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        # one thread a model instance: numpy's pools would fight with the other instances for the cores
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
