"""Backend `cpp`: C++ on the CPU. Outputs are allocated here and filled by the library."""
