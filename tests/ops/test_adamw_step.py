"""adamw_step and gradient_norms against the formulas in Python floats (fp64), and their contract as torch ops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.ops.adamw_step import SPECS, Segment, adamw_step, adamw_step_op, clip_coefficient, gradient_norms, total_norm
from fastlora.ops.registry import implementation_counts
from tests.flat import make_flat
from tests.tolerances import FP64_EXACT

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def adamw_in_python(p: float, g: float, m: float, v: float, step: int, clip: float) -> tuple[float, float, float]:
    """Algorithm 2 of arXiv 1711.05101 for one entry, as printed there: decay, moments, bias-corrected step."""
    (beta1, beta2), lr = SETTINGS["betas"], SETTINGS["lr"]
    g *= clip
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return p - lr * (m_hat / (math.sqrt(v_hat) + SETTINGS["eps"]) + SETTINGS["weight_decay"] * p), m, v


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
def test_step_is_the_papers_formula(masked: bool, device: str) -> None:
    """fp64; frozen entries keep their bits even where the gradient is NaN, and nothing is written between matrices."""
    flat = make_flat(masked=masked, dtype=torch.float64)
    grad, exp_avg = (torch.randn_like(flat.data) for _ in range(2))
    exp_avg_sq = torch.rand_like(flat.data)
    trains = ~flat.gaps
    if flat.mask is not None:
        trains &= flat.mask
        grad[~flat.mask] = float("nan")
        exp_avg[~flat.mask], exp_avg_sq[~flat.mask] = 0.0, 0.0
    before = [flat.data, exp_avg, exp_avg_sq]
    for buffer in (*before, grad):
        buffer[flat.gaps] = float("nan")
    after = [b.to(device, copy=True) for b in before]
    on_device = [None if b is None else b.to(device) for b in (grad, flat.mask)]
    clip = torch.tensor(0.25, dtype=torch.float64, device=device)
    adamw_step(after[0], on_device[0], *after[1:], on_device[1], flat.segments, clip_coef=clip, step=3, **SETTINGS)

    for i in range(len(flat.data)):
        old = [float(b[i]) for b in before]
        new = [float(b[i]) for b in after]
        if trains[i]:
            p, m, v = adamw_in_python(old[0], float(grad[i]), old[1], old[2], step=3, clip=0.25)
            assert new == pytest.approx([p, m, v], rel=FP64_EXACT, abs=FP64_EXACT), f"entry {i}"
        else:
            assert new == pytest.approx(old, rel=0, abs=0, nan_ok=True), f"entry {i} is frozen or between matrices"


@pytest.mark.parametrize("device", DEVICES)
def test_norms_are_per_matrix_and_ignore_the_gaps(device: str) -> None:
    flat = make_flat(dtype=torch.float64)
    grad = torch.randn_like(flat.data).masked_fill(flat.gaps, float("nan"))
    expected = [math.sqrt(math.fsum(float(x) ** 2 for x in g.flatten())) for g in flat.read(grad)]
    norms_m = gradient_norms(grad.to(device), flat.segments)
    assert norms_m.tolist() == pytest.approx(expected, rel=FP64_EXACT)
    assert float(total_norm(norms_m)) == pytest.approx(math.hypot(*expected), rel=FP64_EXACT)


def test_gradient_is_only_read() -> None:
    flat = make_flat()
    grad = torch.randn_like(flat.data)
    kept, moments = grad.clone(), [torch.zeros_like(grad) for _ in range(2)]
    adamw_step(flat.data, grad, *moments, None, flat.segments, clip_coef=torch.tensor(0.5), step=1, **SETTINGS)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize(("norm", "expected"), [(0.0, 1.0), (1.0, 1.0 / (1.0 + 1e-6)), (4.0, 2.0 / (4.0 + 1e-6))])
def test_clip_coefficient(norm: float, expected: float) -> None:
    limit = 2.0 if norm == 4.0 else 1.0
    assert float(clip_coefficient(torch.tensor(norm, dtype=torch.float64), limit)) == pytest.approx(expected, rel=FP64_EXACT)


def test_cost_counts_every_byte_once() -> None:
    """Without gaps: four buffers read and three written of 4 bytes; the norm reads one and writes one number a matrix."""
    segment, buffers = Segment("a", 0, (4, 8), False), [torch.zeros(32) for _ in range(4)]
    norms, step = (spec.cost for spec in SPECS)
    places = ([segment.offset], [4], [8], [False])
    assert norms(buffers[0], *places).bytes == 4 * 32 + 4
    assert step(*buffers, None, torch.ones(()), *places, 1, 1e-3, 0.9, 0.99, 1e-8, 0.0).bytes == 7 * 4 * 32


def test_calls_are_counted() -> None:
    before = implementation_counts.copy()
    gradient_norms(torch.zeros(16), (Segment("a", 0, (2, 3), False),))
    assert (implementation_counts - before) == {("gradient_norms", "reference"): 1}


@pytest.mark.parametrize(
    ("offset", "shape", "message"),
    [(-16, (2, 3), "a: offset -16 is before the start of the buffer"), (0, (0, 3), "a module of rank 0 has no")],
)
def test_impossible_segments_are_refused(offset: int, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segment("a", offset, shape, False)


def test_buffers_of_another_layout_are_refused() -> None:
    def call(param: Tensor, moment: Tensor) -> None:
        place, settings = ([16], [4], [4], [False]), (0.1, 0.9, 0.9, 1e-8, 0.0)
        adamw_step_op(param, param, moment, moment.clone(), None, torch.ones(()), *place, 1, *settings)

    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        call(torch.zeros(16), torch.zeros(16))
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match="exp_avg has not the shape of param"):
        call(torch.zeros(32), torch.zeros(16))
