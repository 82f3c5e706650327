"""How the C library treats freed memory: it keeps what updates free, and gives back what environments free."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_TRIM_THRESHOLD = 128 * 1024  # glibc's own, to begin with

_kept = False  # whether `keep_freed_memory` holds


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for what it allocates next; where the C library is not glibc, nothing.

    An update allocates and frees the activations of every pass: 100 MB at the published MT10 size. By default glibc
    hands such pieces back to the system, and the next update gets fresh pages, each of which the system must find and
    zero: an eighth of the time of an MT10 update on two cores. What is freed within `giving_back_memory` is not kept.
    """
    global _kept
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_MAX, 0)  # large pieces come from the heap, too
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # whose end is never given back
        _kept = True


@contextmanager
def giving_back_memory() -> Iterator[None]:
    """For making and freeing environments: the system gets back what this block frees, and all that glibc holds free.

    EnvPool takes some 25 MiB an environment, in a thread of each pool's own, and glibc lets a new thread allocate from
    whichever of its heaps (eight a core) has no thread left. Pools made anew again and again so leave free pieces in
    one heap after another, which threads of other heaps cannot use, until each has held as much as all pools together.
    Meanwhile the learner may be at work: its next update then takes fresh pages once.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    if _kept:
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)  # what lies free at a heap's end goes as it is freed
    try:
        yield
    finally:
        libc.malloc_trim(0)  # what lies free within the heaps
        if _kept:
            libc.mallopt(_M_TRIM_THRESHOLD, -1)
