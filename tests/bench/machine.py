"""The machine and the versions that numbers belong to."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

LIBRARIES = ("grpcio", "nats-py", "uvloop", "protobuf", "tritonclient", "nvidia-pytriton")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def busy_s() -> float:
    """Processor time that anybody used since the machine started, all cores together; what a hypervisor took included."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def describe() -> dict[str, str]:
    return {
        "cores": str(cores()),
        "cpu": _cpu_model(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "nats-server": _nats_server(),
        **{name: _version(name) for name in LIBRARIES},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _nats_server() -> str:
    binary = Path(sys.executable).parent / "nats-server"
    return subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
