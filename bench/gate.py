"""Before any timing: all three libraries compute the same gradient from the recorded rollout, or there are no numbers.

In float32, the unclipped accumulated gradient of every A and B. TRL's is the yardstick.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.contender import Contender
from bench.race import Worker

MIN_COSINE = 0.999
"""Two float32 paths agree to 1e-5 (see bench/accuracy.py); what a wrong term, mask or sample costs is a per cent or more."""
MAX_NORM_ERROR = 0.01
"""|‖g‖ / ‖g_TRL‖ − 1|: a cosine does not see a wrong normaliser."""

TRL = Contender("trl", micro_batch=4)
CHECKED = (Contender("plain", micro_batch=4), Contender("fastlora"))


class GateError(RuntimeError):
    """A contender computes something else than TRL; the message says who, and how far off."""


def check_gradients(folder: Path, threads: int) -> dict[str, float]:
    """Contender -> cosine with TRL's gradient. Raises GateError."""
    expected = gradient_of(TRL, folder, threads)
    return {contender.name: agreement(contender.name, gradient_of(contender, folder, threads), expected) for contender in CHECKED}


def gradient_of(contender: Contender, folder: Path, threads: int) -> dict[str, Tensor]:
    """From a process of its own: `model.layers.0.self_attn.q_proj.lora_A` -> dA, and so on."""
    with tempfile.TemporaryDirectory() as scratch, Worker(contender, folder, threads) as worker:
        path = Path(scratch) / "gradient.safetensors"
        worker.wait_until_ready()
        worker.run("gradient", str(path))
        return load_file(path)


def agreement(name: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The cosine of two gradients, all matrices in one vector. Raises GateError where they are not the same gradient."""
    if odd := sorted(got.keys() ^ expected.keys()):
        raise GateError(f"{name}: {len(odd)} matrices have a gradient on one side only, the first is {odd[0]}")
    ours, theirs = (torch.cat([side[key].double().flatten() for key in sorted(expected)]) for side in (got, expected))
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    norm_ratio = float(ours.norm() / theirs.norm())
    if not (cosine > MIN_COSINE and abs(norm_ratio - 1) < MAX_NORM_ERROR):  # also refuses NaN
        raise GateError(
            f"{name} and TRL disagree on the gradient of the recorded rollout: cosine {cosine:.6f} (needs {MIN_COSINE}), "
            f"ratio of norms {norm_ratio:.4f}. Nothing is timed until they agree"
        )
    return cosine
