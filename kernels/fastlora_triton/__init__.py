"""Triton kernels of fastlora's ops, one file per op under the op's name. Needs triton; a GPU only to launch."""

import os

# Triton 3.9 fuses multiply and add and 3.10 will not unless told to: the same machine code from both.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
