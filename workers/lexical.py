"""Lexical text embedding: hashed concepts and character n-grams, signed, in 384 dimensions, of unit length.

Each feature is spread over four signed dimensions taken from a stable hash (a sparse random projection: Achlioptas 2003,
Weinberger et al. 2009), so that inner products are kept in expectation and one collision cannot spoil a pair. Term
frequency is sublinear, 1 + ln(tf); a word that says little weighs less (`words.weight`).
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from workers.words import terms, weight

DIMENSIONS = 384
_SPREAD = 4  # dimensions a feature
_GRAM = 4  # characters of an n-gram
_GRAMS_SHARE = 0.4  # length of all n-grams of a term together, the term itself being 1
_LONGEST_TEXT = 4096  # characters looked at


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """Shape (len(texts), 384), float32, each row of length 1; a row of zeros for a text without a word that counts."""
    matrix = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
    for row, text in zip(matrix, texts, strict=True):
        for term, times in Counter(terms(text[:_LONGEST_TEXT])).items():
            row += _vector(term) * np.float32(1.0 + math.log(times))
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    np.divide(matrix, lengths, out=matrix, where=lengths > 0)
    return matrix


@lru_cache(maxsize=20_000)
def _vector(term: str) -> NDArray[np.float32]:
    """The term's own feature and, weaker, its n-grams, so that spellings of one family stay near."""
    vector = np.zeros(DIMENSIONS, dtype=np.float32)
    _add(vector, f"w:{term}", 1.0)
    if len(term) > _GRAM:
        padded = f"^{term}$"
        grams = [padded[start : start + _GRAM] for start in range(len(padded) - _GRAM + 1)]
        for gram in grams:
            _add(vector, f"g:{gram}", _GRAMS_SHARE / math.sqrt(len(grams)))
    return vector * np.float32(weight(term))


def _add(vector: NDArray[np.float32], feature: str, amount: float) -> None:
    digest = hashlib.blake2b(feature.encode(), digest_size=4 * _SPREAD).digest()
    for word in np.frombuffer(digest, dtype="<u4").tolist():
        sign = 1.0 if word & 1 else -1.0
        vector[(word >> 1) % DIMENSIONS] += sign * amount / math.sqrt(_SPREAD)
