"""Rendezvous hashing (Thaler and Ravishankar 1998): which of several names a key belongs to. Pure, the same in every process.

Each name gets a score for the key, and the highest wins. A name that comes takes a share of the keys from each of the others; one that goes
gives up its own; no other key moves.
"""

from collections.abc import Iterable
from hashlib import blake2b


def highest(key: str, names: Iterable[str]) -> str:
    """The name that the key belongs to. names: without NUL. Raises ValueError when there are none."""
    data = key.encode()
    return max(names, key=lambda name: (blake2b(name.encode() + b"\0" + data, digest_size=8).digest(), name))
