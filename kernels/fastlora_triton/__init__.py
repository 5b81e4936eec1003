"""Triton kernels of fastlora's ops, one file per op under the op's name. Needs triton; a GPU only to launch."""
