"""What to do after a Triton has ended: say why in one sentence, and clear away what a killed one leaves behind."""

import os
import re
import select
import signal
from pathlib import Path

STUB = "triton_python_backend_stub"
_SHM_DIR = Path("/dev/shm")  # where POSIX shared memory lives on Linux
_LONGEST_REASON = 300


def explain_failure(log_text: str) -> str:
    """Why the server whose output this is did not start, in one line that says what to do."""
    if match := re.search(r"Socket '([^']*):(\d+)' already in use", log_text):
        address, port = match.groups()
        return f"Triton could not start: port {port} on {address} is in use; stop what listens there or choose another port"
    if match := re.search(r"failed to load '([^']+)' version \d+: (.*)", log_text):
        return _model_failure(match.group(1), match.group(2))
    if match := re.search(r"Poll failed for model directory '([^']+)': (.*)", log_text):
        detail = re.search(r"Error parsing text-format [\w.]+: (.*)", log_text)
        return _model_failure(match.group(1), detail.group(1) if detail else match.group(2))
    if match := re.search(r"failed to load model '([^']+)': (.*)", log_text):
        return _model_failure(match.group(1), match.group(2))
    if match := re.search(r"error while loading shared libraries: ([^:\s]+):", log_text):
        return f"Triton could not start: the shared library {match.group(1)} was not found; install it or reinstall the wheel"
    errors = re.findall(r'^(?:E\d{4} .*?\] "?|error: )(.*)$', log_text, re.MULTILINE)
    # Said on every machine without a GPU, and no fault.
    errors = [text for text in errors if "CudaDriverHelper" not in text]
    if errors:
        return f"Triton could not start: {_first_line(errors[-1])}; its log has more"
    return "Triton ended without saying why; its log may have more"


def _model_failure(model: str, reason: str) -> str:
    if "No space left" in reason or "shared memory" in reason:
        return (
            f"Triton could not load the model '{model}': too little shared memory ({_first_line(reason)}); free /dev/shm or make it larger"
        )
    return f"Triton could not load the model '{model}': {_first_line(reason)}; correct the model or take it out of the repository"


def _first_line(reason: str) -> str:
    """Without the traceback, which Triton logs with escaped line ends, and without its error class."""
    text = re.split(r"\\n|\n", reason.strip())[0].strip().removeprefix('"').rstrip(".")
    return re.sub(r"^(?:Internal|Invalid argument): ", "", text)[:_LONGEST_REASON]


def remove_shared_memory(prefix: str) -> int:
    """Remove the shared memory that a killed Triton of this prefix left behind; returns how many regions that were.

    Call it only when that server and its stubs are gone. Raises ValueError for an empty prefix.
    """
    if not prefix:
        raise ValueError("an empty prefix would remove the shared memory of every program")
    removed = 0
    for region in _SHM_DIR.iterdir() if _SHM_DIR.is_dir() else ():
        if region.name.startswith((prefix, f"sem.{prefix}")) and region.is_file():
            region.unlink(missing_ok=True)
            removed += 1
    return removed


def end_stubs(prefix: str) -> int:
    """Kill the model processes of this prefix whose server is dead, wait until they are gone, return their number.

    A stub ends by itself when its server dies, except while a model waits for the server's answer (for example to
    `is_cancelled`): that one stays for ever. Stubs of a server that lives are left alone.
    """
    ended = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            descriptor = os.pidfd_open(int(folder.name))
        except OSError:
            continue
        try:
            # stub, model.py, shared memory name, its size, its growth, the server's process id, ...
            argv = (folder / "cmdline").read_bytes().split(b"\0")
            if len(argv) < 6 or not argv[0].endswith(STUB.encode()) or not argv[2].startswith(prefix.encode()):
                continue
            if _is_alive(int(argv[5])):
                continue
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], 5.0)  # readable when the process has ended
            ended += 1
        except OSError:
            continue  # gone by itself in between
        finally:
            os.close(descriptor)
    return ended


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
