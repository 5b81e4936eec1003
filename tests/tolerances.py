"""Every tolerance of the test suite, with its reason. Nothing here is loosened to make a test pass."""

FP64_EXACT = 1e-12
"""Relative error between two orders of the same fp64 sums: 2^-53 × the square root of the longest sum (1e5) is 4e-14; 25 × that."""

FAST_PATH_ERROR_FACTOR = 1.1
"""design.md, section 6.2: error of the fast path against fp64 is at most this many times that of PEFT + TRL in the same dtype."""
