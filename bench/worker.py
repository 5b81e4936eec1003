"""One contender in a fresh process: a JSON command per line on stdin, a JSON answer per line on stdout.

    python -m bench.worker '{"library": "trl", ...}' WORKLOAD_FOLDER THREADS
    <- {"ready": true}                                                      loaded
    -> {"do": "run"}        <- {"seconds": 8.1, "cpu_seconds": 16.0, "peak_bytes": 3400000000, "metrics": {}}

It ends with its stdin. Whatever the libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import torch

from bench.contender import Command, Contender, Serve, peak_bytes


def contender_loop(contender: Contender) -> Serve:
    """The function that serves this contender; imports only its library, so that no other's memory is counted."""
    if contender.library == "trl":
        from bench import trl_side

        return trl_side.serve
    if contender.library == "plain":
        from bench import plain_loop

        return plain_loop.serve
    if contender.library == "gemm":
        from bench import gemm_side

        return gemm_side.serve
    if contender.library == "fastlora-vllm":
        from bench import vllm_side

        return vllm_side.serve
    from bench import fastlora_side

    return fastlora_side.serve


def serve(contender: Contender, folder: Path, loop: Serve, stdin: TextIO, stdout: TextIO) -> None:
    """Runs `loop` between two streams."""

    def say(answer: dict[str, Any]) -> None:
        stdout.write(json.dumps(answer) + "\n")
        stdout.flush()

    def commands() -> Iterator[Command]:
        say({"ready": True})
        for line in stdin:
            yield Command(**json.loads(line))

    def report(seconds: float, cpu_seconds: float, metrics: Mapping[str, float] = MappingProxyType({})) -> None:
        say({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes(), "metrics": dict(metrics)})

    loop(contender, folder, commands(), report)


def main() -> None:
    """See the module's docstring."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout too
    contender, folder, threads = Contender(**json.loads(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    serve(contender, folder, contender_loop(contender), sys.stdin, answers)


if __name__ == "__main__":
    main()
