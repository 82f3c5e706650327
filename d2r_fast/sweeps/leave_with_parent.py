"""`python leave_with_parent.py PARENT COMMAND ...` becomes COMMAND, which gets SIGTERM when the process PARENT ends,
however that ends: a run saves and leaves when the worker that started it is gone.

A file that is run by its path, and imports nothing of the package: that would take seconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))  # outlives exec
    if os.getppid() == int(parent):  # it may have ended before
        os.execv(command[0], command)
