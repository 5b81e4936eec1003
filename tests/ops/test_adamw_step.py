"""adamw_step and gradient_norms against the formulas in fp64: every implementation and instruction set, odd sizes, masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import extension
from fastlora.flat import FlatParameters
from fastlora.ops.adamw_step import (
    SPECS,
    Segment,
    adamw_step,
    adamw_step_op,
    clip_coefficient,
    gradient_norms,
    gradient_norms_op,
    segment_table,
    total_norm,
)
from fastlora.ops.registry import ImplementationError, implementation_counts, use_implementation
from tests.flat import HandmadeFlat, make_flat
from tests.ops.implementations import threads
from tests.tolerances import FP32_ADAMW, FP32_ONE_ROUNDING, FP64_EXACT, PARAMETER_ROUNDED_ONCE, WITHOUT_FMA

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
IMPLEMENTATIONS = ("reference", "generic", "avx2", "avx512", "avx512bf16")
"""The reference, and the C++ kernels of each instruction set."""
DENSITIES = (None, 0.0, 0.001, 0.03, 0.5, 1.0)
"""Share of entries that train; None = no mask."""
LARGE_MODULES = ((1, 7, 1), (3, 5, 19), (17, 33, 23), (5, 40009, 3), (16, 64, 48))
"""One matrix of several blocks of the kernels (16,384 entries), with a tail, among small ones."""


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test in this implementation; skips, by name, what cannot run here."""
    if request.param == "reference":
        with use_implementation("reference"):
            yield request.param
        return
    if reason := extension.missing():
        pytest.skip(reason)
    before = extension.instruction_set()
    try:
        torch.ops.fastlora_cpu.use_instruction_set(request.param)
    except RuntimeError:
        pytest.skip(f"this processor has {before}, not {request.param}")
    try:
        with use_implementation("cpp"):
            yield request.param
    finally:
        torch.ops.fastlora_cpu.use_instruction_set(before)


def flat_of_density(density: float | None, modules: tuple[tuple[int, int, int], ...] = LARGE_MODULES) -> HandmadeFlat:
    """Random parameters; rows of 40 entries train together, so that the trained entries are both scattered and neighbours."""
    flat = make_flat(modules)
    if density is not None:
        flat.mask = torch.rand(len(flat.data)) < density
        for start in range(0, len(flat.data), 400):
            flat.mask[start : start + 40] = flat.mask[start]
    return flat


def random_moments(flat: FlatParameters, index_k: Tensor | None) -> tuple[Tensor, Tensor]:
    size = len(flat.data) if index_k is None else len(index_k)
    return torch.randn(size), torch.rand(size)


def adamw_fp64(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, clip: float, settings: dict[str, Any]) -> list[Tensor]:
    """Algorithm 2 of arXiv 1711.05101 as printed there: decay, moments, bias-corrected step."""
    (beta1, beta2), lr = settings["betas"], settings["lr"]
    p, g, m, v = (x.double() for x in (p, g, m, v))
    g = g * clip
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return [p - lr * (m_hat / (v_hat.sqrt() + settings["eps"]) + settings["weight_decay"] * p), m, v]


def where_trains(flat: HandmadeFlat) -> Tensor:
    """bool [N], from the layout made by hand: neither a gap nor masked."""
    return ~flat.gaps if flat.mask is None else flat.mask & ~flat.gaps


@pytest.mark.parametrize("density", DENSITIES)
def test_step_is_the_papers_formula_and_touches_nothing_else(density: float | None, implementation: str) -> None:
    """What does not train may hold anything, NaN too, and keeps its bits."""
    flat = flat_of_density(density)
    trains, index_k = where_trains(flat), flat.trainable_index()
    flat.grad.copy_(torch.randn_like(flat.grad)).masked_fill_(~trains, float("nan"))
    flat.data.masked_fill_(flat.gaps, float("nan"))
    old_p, old_g = flat.data.clone(), flat.grad.clone()
    m, v = random_moments(flat, index_k)
    old = [x[trains] if index_k is None else x.clone() for x in (m, v)]
    expected = adamw_fp64(old_p[trains], old_g[trains], *old, step=3, clip=0.25, settings=SETTINGS)
    gaps_before = [x[flat.gaps].clone() for x in (m, v)] if index_k is None else []
    adamw_step(flat.data, flat.grad, m, v, segment_table(flat.segments, index_k), index_k, clip_coef=torch.tensor(0.25), step=3, **SETTINGS)

    got = [flat.data[trains], *(x[trains] if index_k is None else x for x in (m, v))]
    for what, ours, truth in zip(("param", "exp_avg", "exp_avg_sq"), got, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=FP32_ADAMW, atol=FP32_ADAMW, msg=lambda text, w=what: f"{w}: {text}")
    assert torch.equal(flat.data[~trains].view(torch.int32), old_p[~trains].view(torch.int32)), "frozen entry or gap written"
    assert torch.equal(flat.grad.view(torch.int32), old_g.view(torch.int32)), "the gradient is only read"
    for before, buffer in zip(gaps_before, (m, v), strict=False):
        assert torch.equal(buffer[flat.gaps], before), "gap of a moment written"


@pytest.mark.parametrize("density", DENSITIES)
def test_norms_are_per_matrix_and_see_what_trains_only(density: float | None, implementation: str) -> None:
    flat = flat_of_density(density)
    trains, index_k = where_trains(flat), flat.trainable_index()
    grad = (torch.randn_like(flat.data) * 10 ** torch.empty_like(flat.data).uniform_(-6, 6)).masked_fill(~trains, float("nan"))
    if implementation == "reference":
        grad = grad.double()  # in float32 it has torch's rounding, which tests/parity pins
    norms_m = gradient_norms(grad, segment_table(flat.segments, index_k), index_k)
    expected = [
        math.sqrt(math.fsum(float(x) ** 2 for x in grad[s.offset :][: s.numel][trains[s.offset :][: s.numel]])) for s in flat.segments
    ]
    assert norms_m.tolist() == pytest.approx(expected, rel=FP64_EXACT if implementation == "reference" else FP32_ONE_ROUNDING)


def test_norms_neither_overflow_nor_vanish_in_cpp(implementation: str) -> None:
    """Squares are summed in double."""
    if implementation == "reference":
        pytest.skip("the reference is bitwise torch, whose float32 norm of 1e-30 is 0 and of 1e30 inf")
    grad = torch.cat([torch.full((33,), 1e-30), torch.full((33,), 1e30)])
    table_m6 = segment_table([Segment("small", 0, (3, 11), True), Segment("large", 33, (3, 11), True)], None)
    assert gradient_norms(grad, table_m6, None).tolist() == pytest.approx(
        [math.sqrt(33) * 1e-30, math.sqrt(33) * 1e30], rel=2 * FP32_ONE_ROUNDING
    )  # and 1e30 rounded


@pytest.mark.parametrize("density", [None, 0.5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_entry_shows_in_its_own_norm_only(bad: float, density: float | None, implementation: str) -> None:
    flat = flat_of_density(density)
    index_k, last = flat.trainable_index(), flat.segments[7]
    trained = where_trains(flat).nonzero().squeeze(1)
    grad = torch.randn_like(flat.data)
    grad[trained[trained < last.offset + last.numel][-1]] = bad
    norms_m = gradient_norms(grad, segment_table(flat.segments, index_k), index_k)
    assert [math.isfinite(x) for x in norms_m.tolist()] == [m != 7 for m in range(len(flat.segments))]


def test_norms_do_not_depend_on_the_number_of_threads(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("torch's own norm splits its sum among the threads")
    flat = flat_of_density(None)
    grad, table_m6 = torch.randn_like(flat.data), segment_table(flat.segments, None)
    norms = []
    for number in (1, 2, 3):
        with threads(number):
            norms.append(gradient_norms(grad, table_m6, None))
    assert all(torch.equal(n, norms[0]) for n in norms)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.4)])
def test_ten_steps_are_no_farther_from_fp64_than_torchs(betas: tuple[float, float], implementation: str) -> None:
    """RMS error of parameters and both moments, all sizes together, against torch.optim.AdamW(fused=True) on the same numbers."""
    if implementation == "reference":
        pytest.skip("the reference is bitwise torch: tests/parity/test_adamw_torch.py")
    settings = {"lr": 3e-3, "betas": betas, "eps": 1e-8, "weight_decay": 0.1}
    flat = make_flat(LARGE_MODULES)
    inside, table_m6 = ~flat.gaps, segment_table(flat.segments, None)
    theirs = torch.nn.Parameter(flat.data[inside].clone())
    torchs = torch.optim.AdamW([theirs], fused=True, **settings)
    m, v = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
    truth = [x[inside].double() for x in (flat.data, m, v)]
    for step in range(1, 11):
        grad, clip = torch.randn_like(flat.data), torch.tensor(1 / step)
        adamw_step(flat.data, grad, m, v, table_m6, None, clip_coef=clip, step=step, **settings)
        theirs.grad = grad[inside] * clip
        torchs.step()
        truth = adamw_fp64(truth[0], grad[inside], *truth[1:], step=step, clip=float(clip), settings=settings)
    state = torchs.state[theirs]
    for name, ours, other, exact in zip(
        ("param", "exp_avg", "exp_avg_sq"),
        (flat.data, m, v),
        (theirs.detach(), state["exp_avg"], state["exp_avg_sq"]),
        truth,
        strict=True,
    ):
        errors = [float((x.double() - exact).square().mean().sqrt()) for x in (ours[inside], other)]
        of_moments = WITHOUT_FMA if implementation == "generic" else 1.0
        factor = PARAMETER_ROUNDED_ONCE if name == "param" else of_moments
        assert errors[0] <= factor * errors[1], f"{name}: RMS error {errors[0]:.3g}, torch's is {errors[1]:.3g}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("masked", [False, True])
def test_reference_is_the_formula_in_fp64(masked: bool, device: str) -> None:
    flat = make_flat(masked=masked, dtype=torch.float64)
    trains, index_k = where_trains(flat), flat.trainable_index()
    grad, size = torch.randn_like(flat.data), len(flat.data) if index_k is None else len(index_k)
    m, v = torch.randn(size, dtype=torch.float64), torch.rand(size, dtype=torch.float64)
    of_moments = trains if index_k is None else slice(None)
    expected = adamw_fp64(flat.data[trains], grad[trains], m[of_moments], v[of_moments], step=3, clip=0.25, settings=SETTINGS)
    buffers = [x.to(device) for x in (flat.data, grad, m, v)]
    on_device, table_m6 = None if index_k is None else index_k.to(device), segment_table(flat.segments, index_k)
    clip = torch.tensor(0.25, dtype=torch.float64, device=device)
    norms_m = gradient_norms(buffers[1], table_m6, on_device)
    adamw_step(*buffers, table_m6, on_device, clip_coef=clip, step=3, **SETTINGS)
    got = [buffers[0].cpu()[trains], *(x.cpu()[of_moments] for x in buffers[2:])]
    torch.testing.assert_close(got, expected, rtol=FP64_EXACT, atol=FP64_EXACT)
    hypotenuse = math.sqrt(math.fsum(float(x) ** 2 for x in grad[trains]))
    assert float(total_norm(norms_m)) == pytest.approx(hypotenuse, rel=FP64_EXACT)


@pytest.mark.parametrize(("norm", "expected"), [(0.0, 1.0), (1.0, 1.0 / (1.0 + 1e-6)), (4.0, 2.0 / (4.0 + 1e-6))])
def test_clip_coefficient(norm: float, expected: float) -> None:
    limit = 2.0 if norm == 4.0 else 1.0
    assert float(clip_coefficient(torch.tensor(norm, dtype=torch.float64), limit)) == pytest.approx(expected, rel=FP64_EXACT)


def test_table_by_hand() -> None:
    """Ranges in the moments: a segment's own elements, or its part of the index."""
    segments = (Segment("a", 2, (2, 3), False), Segment("b", 10, (1, 4), True), Segment("c", 14, (1, 2), True))
    assert segment_table(segments, None).tolist() == [[2, 2, 3, 0, 2, 8], [10, 1, 4, 1, 10, 14], [14, 1, 2, 1, 14, 16]]
    index_k = torch.tensor([2, 7, 13], dtype=torch.int32)
    assert segment_table(segments, index_k).tolist() == [[2, 2, 3, 0, 0, 2], [10, 1, 4, 1, 2, 3], [14, 1, 2, 1, 3, 3]]
    assert segment_table((), index_k).shape == (0, 6)


def test_cost_counts_what_trains_once() -> None:
    """Four buffers read and three written of 4 bytes; the norm reads one and writes one number a matrix; an index adds 4 bytes an entry."""
    segments, buffers = [Segment("a", 0, (4, 8), False)], [torch.zeros(32) for _ in range(4)]
    norms, step = (spec.cost for spec in SPECS)
    for index_k, k in ((None, 32), (torch.tensor([1, 30], dtype=torch.int32), 2)):
        table_m6, index_bytes = segment_table(segments, index_k), 0 if index_k is None else 4 * k
        assert norms(buffers[0], table_m6, index_k).bytes == 4 * k + 4 + index_bytes
        assert step(*buffers, torch.ones(()), table_m6, index_k, 1, 1e-3, 0.9, 0.99, 1e-8, 0.0).bytes == 7 * 4 * k + index_bytes


def test_no_segments_and_no_entries_change_nothing(implementation: str) -> None:
    for index_k in (None, torch.empty(0, dtype=torch.int32)):
        for segments in ((), (Segment("a", 0, (4, 8), False),)):
            if index_k is None and segments:
                continue
            param, (m, v) = torch.ones(32), (torch.ones(32 if index_k is None else 0) for _ in range(2))
            table_m6 = segment_table(segments, index_k)
            assert gradient_norms(param, table_m6, index_k).tolist() == [0.0] * len(segments)
            adamw_step(param, param.clone(), m, v, table_m6, index_k, clip_coef=torch.ones(()), step=1, **SETTINGS)
            assert bool((param == 1).all()) and bool((m == 1).all()) and bool((v == 1).all())


def test_calls_are_counted_under_the_name_of_what_ran(implementation: str) -> None:
    before, table_m6 = implementation_counts.copy(), segment_table((Segment("a", 0, (2, 3), False),), None)
    gradient_norms(torch.zeros(16), table_m6, None)
    with torch.no_grad():
        gradient_norms(torch.zeros(16), table_m6, None)
    assert (implementation_counts - before) == {("gradient_norms", "reference" if implementation == "reference" else "cpp"): 2}


@pytest.mark.parametrize(
    ("offset", "shape", "message"),
    [(-16, (2, 3), "a: offset -16 is before the start of the buffer"), (0, (0, 3), "a module of rank 0 has no")],
)
def test_impossible_segments_are_refused(offset: int, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segment("a", offset, shape, False)


def test_buffers_of_another_layout_are_refused(implementation: str) -> None:
    settings = (1, 0.1, 0.9, 0.9, 1e-8, 0.0)
    outside = segment_table([Segment("a", 16, (4, 4), False)], None)
    zeros, clip = torch.zeros(16), torch.ones(())
    with pytest.raises(RuntimeError, match="exceeds"):
        gradient_norms_op(zeros, outside, None)
    with pytest.raises(RuntimeError, match="exceeds"):
        adamw_step_op(zeros.clone(), zeros, zeros.clone(), zeros.clone(), clip, outside, None, *settings)
    index_k = torch.tensor([3, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"adamw_step: exp_avg is \[16\], it needs \[2\]"):
        adamw_step(zeros, zeros, zeros, zeros, outside, index_k, clip_coef=clip, step=1, **SETTINGS)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError, match=r"exp_avg is \[16\], it needs \[32\]"):
        adamw_step_op(
            torch.zeros(32), torch.zeros(32), torch.zeros(16), torch.zeros(16), torch.ones(()), mode.from_tensor(outside), None, *settings
        )


def test_cpp_checks_what_it_would_read() -> None:
    """The kernels get raw pointers: a wrong dtype, or positions outside of their segment, must not reach them."""
    if reason := extension.missing():
        pytest.skip(reason)
    table_m6, grad = segment_table([Segment("a", 4, (2, 4), False)], None), torch.zeros(16)
    cpp = torch.ops.fastlora_cpu.gradient_norms
    with pytest.raises(RuntimeError, match="index_k must be contiguous int32"):
        cpp(grad, table_m6, torch.arange(16))
    for positions in ([3, 5], [5, 12]):
        index_k = torch.tensor(positions, dtype=torch.int32)
        table_m6[0, 4:] = torch.tensor([0, 2])
        with pytest.raises(RuntimeError, match="index_k leads out of segment 0"):
            cpp(grad, table_m6, index_k)
    with pytest.raises(RuntimeError, match=r"table_m6 must be contiguous int64 \[segments, 6\]"):
        cpp(grad, table_m6[:, :5], None)
    with use_implementation("cpp"), pytest.raises(ImplementationError, match=r"gradient_norms: .* it takes float32 only"):
        gradient_norms(grad.bfloat16(), table_m6, None)
