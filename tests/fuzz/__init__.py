"""A fuzzer of everything that is read from disk; ``python -m tests.fuzz`` tells how to use it."""
