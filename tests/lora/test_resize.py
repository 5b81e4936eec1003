"""A module at another rank against a full SVD of [n, d] matrices and against autograd, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastlora.lora.resize import Components, Sides, resize
from tests.tolerances import FP64_EXACT

D, N = 21, 34
RANKS = (0, 1, 3, 17, 30, 40)
"""30 and 40 are more than d allows a product to have."""


def components(rank: int, scale: float = 2.0, *, d: int = D, n: int = N, b_rank: int | None = None) -> Components:
    """Random ones; b_rank: of B, where it is lower than that of the shape."""
    generator = torch.Generator().manual_seed(rank)

    def random(width: int) -> Tensor:
        return torch.randn(rank, width, generator=generator, dtype=torch.float64)

    b_rn = random(n)
    if b_rank is not None:
        b_rn = torch.randn(rank, b_rank, generator=generator, dtype=torch.float64) @ random(n)[:b_rank]
    return Components(
        scale if rank else 0.0,
        value=Sides(random(d), b_rn),
        exp_avg=Sides(random(d), random(n)),
        exp_avg_sq=Sides(random(d).square(), random(n).square()),
    )


def delta_w(c: Components) -> Tensor:
    """s B A [n, d]."""
    return c.scale * c.value.b_rn.t() @ c.value.a_rd


def best(w_nd: Tensor, rank: int) -> Tensor:
    """Eckart & Young: the truncated SVD of the whole matrix."""
    u, s, vh = torch.linalg.svd(w_nd, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def close(got: Tensor, expected: Tensor, size: float) -> bool:
    """Relative to the size of what went in."""
    return bool((got - expected).norm() <= FP64_EXACT * max(size, 1.0))


@pytest.mark.parametrize("new", RANKS)
@pytest.mark.parametrize("old", RANKS)
@pytest.mark.parametrize("b_rank", [None, 2, 0])
def test_delta_w_is_the_best_of_its_rank(old: int, new: int, b_rank: int | None) -> None:
    """Any rank to any other, B full, of lower rank, and 0; the scale changes too."""
    before = components(old, b_rank=b_rank if b_rank is None else min(b_rank, old))
    result = resize(before, new, 0.7 if new else 0.0, generator())
    w_nd, after = delta_w(before), result.components
    assert after.rank == new and after.value.a_rd.shape == (new, D) and after.value.b_rn.shape == (new, N)
    expected = w_nd if new >= old else best(w_nd, new)
    size = float(w_nd.norm())
    assert close(delta_w(after), expected, size)
    assert result.whole == pytest.approx(size**2, rel=FP64_EXACT)
    assert math.isclose(result.cut, float((w_nd - expected).norm() ** 2), rel_tol=1e-9, abs_tol=FP64_EXACT * max(result.whole, 1.0))
    for sides in (after.value, after.exp_avg, after.exp_avg_sq):
        assert all(torch.isfinite(side).all() and len(side) == new for side in sides)
    assert all((side >= 0).all() for side in after.exp_avg_sq)


@pytest.mark.parametrize(("old", "new"), [(5, 5), (5, 3), (17, 16), (3, 9)])
def test_gradients_carry_over_as_autograd_says(old: int, new: int) -> None:
    """First moments that are gradients at ΔW stay gradients: G is fixed, so that the loss is linear in ΔW."""
    g_nd = torch.randn(N, D, generator=generator(), dtype=torch.float64)

    def gradients(c: Components) -> Sides:
        a, b = (side.clone().requires_grad_() for side in c.value)
        (c.scale * (b.t() @ a) * g_nd).sum().backward()
        return Sides(a.grad, b.grad)

    before = components(old)
    before = Components(before.scale, before.value, gradients(before), before.exp_avg_sq)
    after = resize(before, new, 0.7, generator()).components
    expected, kept = gradients(after), min(old, new)
    for got, wanted in zip(after.exp_avg, expected, strict=True):
        assert close(got[:kept], wanted[:kept], float(wanted.norm()))
        assert not got[kept:].any(), "new components have no history"


def test_second_moments_are_those_of_uncorrelated_gradients() -> None:
    """E(Σ q_k g_k)² = Σ q_k² E g_k² for independent g: a sample of 40,000 gradients through the rule for first moments."""
    before, samples = components(4), 40_000
    size = torch.randn(4, D, generator=generator(), dtype=torch.float64).abs() + 0.1
    draws = size * torch.randn(samples, 4, D, generator=generator(), dtype=torch.float64)
    units_rk = torch.eye(4, D, dtype=torch.float64)  # the first moments of four gradients, side by side: the rule's matrix comes out
    before = Components(2.0, before.value, Sides(units_rk, before.exp_avg.b_rn), Sides(size.square(), before.exp_avg_sq.b_rn))
    after = resize(before, 2, 2.0, generator()).components
    sampled = (after.exp_avg.a_rd[:, :4] @ draws).square().mean(0)
    torch.testing.assert_close(after.exp_avg_sq.a_rd, sampled, rtol=6 * math.sqrt(2 / samples), atol=0.0)


def test_growing_changes_no_bit_of_what_was_there() -> None:
    before = components(3)
    after = resize(before, 8, before.scale, generator()).components
    for old, new in zip(
        (*before.value, *before.exp_avg, *before.exp_avg_sq), (*after.value, *after.exp_avg, *after.exp_avg_sq), strict=True
    ):
        assert torch.equal(new[:3], old)
    assert not after.value.b_rn[3:].any() and not after.exp_avg.a_rd[3:].any()
    bound = 1 / math.sqrt(D)
    assert after.value.a_rd[3:].abs().max() <= bound and after.value.a_rd[3:].std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    other = resize(before, 8, before.scale, torch.Generator().manual_seed(8)).components
    assert not torch.equal(other.value.a_rd[3:], after.value.a_rd[3:])


def test_the_same_rank_changes_no_bit() -> None:
    before = components(5)
    after = resize(before, 5, before.scale, generator()).components
    assert all(torch.equal(x, y) for x, y in zip((*before.value, *before.exp_avg), (*after.value, *after.exp_avg), strict=True))


def test_a_may_be_zero() -> None:
    """As nothing but a strange lora.init_from makes it."""
    before = components(5)
    before = Components(2.0, Sides(0 * before.value.a_rd, before.value.b_rn), before.exp_avg, before.exp_avg_sq)
    after = resize(before, 3, 2.0, generator())
    assert not delta_w(after.components).any() and after.whole == 0
    assert all(torch.isfinite(side).all() for side in (*after.components.exp_avg, *after.components.exp_avg_sq))


def test_shrinking_keeps_the_size_of_a() -> None:
    """Adam moves every entry by the same amount, so that the balance of A and B is a learning rate; rows of A stay orthogonal."""
    before = components(17)
    a_rd = resize(before, 6, 2.0, generator()).components.value.a_rd
    length = float(before.value.a_rd.norm()) / math.sqrt(17)
    torch.testing.assert_close(a_rd @ a_rd.t(), length**2 * torch.eye(6, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def first_updates(v_bn: Tensor, gradients: Tensor, steps_done: int) -> Tensor:
    """|AdamW's updates| over the learning rate of an entry whose m is 0, in the steps after `steps_done`."""
    m, v, updates = torch.zeros_like(v_bn), v_bn.clone(), []
    for k, g in enumerate(gradients, start=steps_done + 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        updates.append(m / (1 - 0.9**k) / (v / (1 - 0.999**k)).sqrt())
    return torch.stack(updates).abs()


def test_new_columns_of_b_start_with_steps_of_the_usual_size() -> None:
    """After 5,000 steps with a steady G: v from the old components bounds the updates; from 0 they reach 6.6 times the learning rate."""
    g_nd = torch.randn(N, 400, generator=generator(), dtype=torch.float64)
    a_rd = torch.empty(16, 400, dtype=torch.float64).uniform_(-1 / 20, 1 / 20, generator=generator())
    old = components(16, 1.0, d=400)
    v_rn = (a_rd @ g_nd.t()).square() * (1 - 0.999**5000)
    before = Components(1.0, Sides(a_rd, 0 * old.value.b_rn), old.exp_avg, Sides(old.exp_avg_sq.a_rd, v_rn))
    after = resize(before, 32, 1.0, generator()).components
    new = (after.value.a_rd[16:] @ g_nd.t()).expand(60, -1, -1)
    typical = first_updates(after.exp_avg_sq.b_rn[16:], new, 5000).median(1).values.median(1).values
    from_zero = first_updates(torch.zeros_like(new[0]), new, 5000).median(1).values.median(1).values
    assert typical.max() < 1.2, "|g| of a random row against the root mean square: below 1 for the median"
    assert from_zero.max() > 6
