"""Where the time of one update goes, by torch.profiler: `python -m bench.time_split CONTENDER_JSON FOLDER THREADS` prints one JSON object.

One warm-up, then one profiled update of the contender's own loop (bench/worker.py) on the recorded workload in FOLDER. Each op's own
time (children excluded) counts for the first class whose pattern its name matches; what no class takes (copies and casts,
allocation, indexing, Python) is `rest`, so that the classes add up to the wall time of the update.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.contender import Command, Commands, Contender
from bench.race import REPOSITORY
from bench.worker import contender_loop

CLASSES = {
    "GEMM": r"^(aten::(mm|addmm|bmm|baddbmm|linear|mkldnn_\w*linear\w*)_?|mkldnn::_linear_pointwise)$",
    "attention": r"packed_attention|scaled_dot_product|flash_attention",
    "log-prob rows": r"logprob_rows|log_softmax|nll_loss|logsumexp|cross_entropy",
    "optimizer": r"adamw|gradient_norms|_foreach|linalg_vector_norm",
    "norms, rotary, SwiGLU": r"rms_norm|swiglu|silu|^aten::(mul|add|sub|neg|pow|mean|rsqrt|cat|sum|div)_?$",
}
"""Class -> pattern of op names, in order of precedence. Plain torch's elementwise ops are norms, rotary, SwiGLU and residual sums; the
profiler does not say which."""
REST = "rest"

Split = dict[str, float]
"""Class -> seconds."""


def split_by_class(ops: Iterable[tuple[str, float]], wall_seconds: float) -> Split:
    """From (op name, its own seconds). `rest` is at least 0: the profiler's clock may run past the update's."""
    split = dict.fromkeys(CLASSES, 0.0)
    for name, seconds in ops:
        for label, pattern in CLASSES.items():
            if re.search(pattern, name):
                split[label] += seconds
                break
    return {**split, REST: max(0.0, wall_seconds - sum(split.values()))}


def profiled_update(contender: Contender, folder: Path) -> Split:
    """In this process."""
    walls: list[float] = []
    profiler = profile(activities=[ProfilerActivity.CPU], acc_events=True)

    def commands() -> Commands:
        yield Command("run")
        with profiler:
            yield Command("run")

    contender_loop(contender)(contender, folder, commands(), lambda wall, cpu: walls.append(wall))
    return split_by_class(_own_seconds(profiler), walls[-1])


def _own_seconds(profiler: profile) -> Iterator[tuple[str, float]]:
    for event in profiler.key_averages():
        yield event.key, event.self_cpu_time_total / 1e6


def measure_split(contender: Contender, folder: Path, threads: int) -> Split:
    """In a process of its own. Raises subprocess.CalledProcessError, its stderr on ours."""
    command = [sys.executable, "-m", "bench.time_split", json.dumps(contender.settings()), str(folder), str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """See the module's docstring."""
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(profiled_update(Contender(**json.loads(sys.argv[1])), Path(sys.argv[2]))))


if __name__ == "__main__":
    main()
