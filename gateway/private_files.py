"""Files and folders that only their owner may read, whatever the folder around them allows."""

import os
import tempfile
from pathlib import Path


def write(path: Path, text: str) -> None:
    """The file is there with its whole text and mode 600, or not at all; one that was there before is replaced. Raises OSError."""
    descriptor, fresh = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 600 from its first moment on
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise


def folder(path: Path) -> Path:
    """Makes it when it is missing; mode 700 in any case. Raises OSError."""
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)
    return path
