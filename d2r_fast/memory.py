"""How the C library treats the memory that updates free."""

import ctypes

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for what it allocates next; where the C library is not glibc, nothing.

    An update allocates and frees the activations of every pass: 100 MB at the published MT10 size. By default glibc
    hands such pieces back to the system, and the next update gets fresh pages, each of which the system must find and
    zero: an eighth of the time of an MT10 update on two cores. The process stays as large as it was at its peak.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)  # large pieces come from the heap, too
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # whose end is never given back
