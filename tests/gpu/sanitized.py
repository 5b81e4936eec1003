"""Every GPU kernel once on small inputs: what compute-sanitizer watches. `python -m tests.gpu.sanitized [--device cpu]`."""

from __future__ import annotations

import argparse
import sys

import torch

from bench.test_ops import delivered, fresh
from fastlora.ops.registry import dispatchers, use_implementation
from tests.gpu.cases import gpu_implementations, inputs, precisions

MAX_ENTRIES = 200_000
"""Of the largest tensor of an input: a watched program runs some hundred times slower."""


def main(argv: list[str] | None = None) -> int:
    """Prints each implementation that ran and how often; status 1 when none did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="where (default: %(default)s)")
    device = torch.device(parser.parse_args(argv).device)
    calls = 0
    for spec, name in gpu_implementations():
        implementation = dispatchers[spec.name].implementations[name]
        if reason := implementation.refuses(device):
            print(f"{spec.name} {name}: {reason}")
            continue
        with torch.no_grad():
            samples = [fresh(arguments) for arguments in inputs(spec, precisions(spec)[0].dtype, device)]
        small = [a for a in samples if not implementation.refuses(device, *a) and all(_entries(x) <= MAX_ENTRIES for x in a)]
        with use_implementation(name), torch.no_grad():
            for arguments in small:
                delivered(spec, arguments)
        calls += len(small)
        print(f"{spec.name} {name}: {len(small)} calls")
    return 0 if calls else 1


def _entries(value: object) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else 0


if __name__ == "__main__":
    sys.exit(main())
