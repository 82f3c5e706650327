"""Backend `cpp`: the library of C++ kernels for the CPU."""
