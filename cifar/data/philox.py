"""Counter-based random numbers, without state: Philox4x32-10.

J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Integer
arithmetic only, so the same on every machine.
"""

import numpy as np
import numpy.typing as npt

_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key after each round


Words = npt.NDArray[np.uint64]  # of 32 bits each


def words(key: int, a: Words | np.uint64, b: Words | np.uint64, c: Words | np.uint64, d: Words | np.uint64) -> Words:
    """Returns four random words [4, ...] for each counter of four words, which are broadcast; `key` has 64 bits.

    A word that many counters share is given once: the first rounds are then cheaper.
    """
    left, right = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        product_a, product_c = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (product_c >> _HIGH) ^ b ^ np.uint64(left), product_c & _LOW
        c, d = (product_a >> _HIGH) ^ d ^ np.uint64(right), product_a & _LOW
        left, right = (left + _WEYL[0]) & 0xFFFFFFFF, (right + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((a, b, c, d))


def below(bounds: Words | np.uint64, random_words: Words) -> npt.NDArray[np.int64]:
    """Maps 32-bit words to integers from 0 to below their bounds; no probability is off 1/bound by more than 2**-32."""
    return ((random_words * bounds) >> _HIGH).view(np.int64)
