"""Cosines, stable and effective rank against numpy's SVD in fp64; the sketch against its stated error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlora.gradient_structure import ConsecutiveCosine, GradientRows, Structure, structure_of
from tests.tolerances import FP64_EXACT, GRAM_RANK, SKETCH_ERRORS

PARTS = {"q_proj": [slice(3, 40), slice(90, 200)], "down_proj": [slice(40, 90)]}
SIZE = 210


def random_rows(count: int) -> Tensor:
    """Common direction and noise, sizes that differ."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, SIZE, generator=generator)
    return (noise + 0.7) * torch.rand(count, 1, generator=generator)


def rows_of(gradients: Tensor, **options: int) -> GradientRows:
    rows = GradientRows(PARTS, len(gradients), seed=0, device=torch.device("cpu"), **options)
    for gradient in gradients:
        rows.add(gradient)
    return rows


def part(gradients: Tensor, name: str) -> np.ndarray:
    return torch.cat([gradients[:, s] for s in PARTS[name]], dim=1).double().numpy()


def check(found: Structure, g_bn: np.ndarray) -> None:
    """Against the definitions, from the singular values of G itself."""
    sigma = np.linalg.svd(g_bn, compute_uv=False)
    p = sigma[sigma > 0] / sigma.sum()
    norms = np.linalg.norm(g_bn, axis=1)
    cosines = [a @ b / (x * y) for a, b, x, y in zip(g_bn, g_bn[1:], norms, norms[1:], strict=False)]
    assert found.stable_rank == pytest.approx(np.linalg.norm(g_bn) ** 2 / sigma[0] ** 2, rel=FP64_EXACT)
    assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=GRAM_RANK)
    assert found.consecutive_cosines == pytest.approx(cosines, rel=FP64_EXACT)


def test_every_part_and_the_whole() -> None:
    gradients = random_rows(5)
    rows = rows_of(gradients)
    grams = rows.grams()
    assert rows.exact and rows.added == 5
    for name in PARTS:
        check(structure_of(grams[name]), part(gradients, name))
    check(structure_of(torch.stack(list(grams.values())).sum(0)), np.hstack([part(gradients, name) for name in PARTS]))


@pytest.mark.parametrize(("vectors", "rank"), [(torch.ones(4, 9), 1.0), (torch.eye(4, 9), 4.0)], ids=["one direction", "orthogonal"])
def test_the_ends_of_the_scale(vectors: Tensor, rank: float) -> None:
    found = structure_of(vectors.double() @ vectors.double().t())
    assert found.stable_rank == pytest.approx(rank) and found.effective_rank == pytest.approx(rank, rel=GRAM_RANK)
    assert found.consecutive_cosines == pytest.approx([float(rank == 1)] * 3)


def test_nothing_to_measure() -> None:
    """One batch; none; a part whose gradient is zero in one batch, or in all."""
    assert structure_of(torch.ones(1, 1).double()).consecutive_cosines == ()
    assert structure_of(torch.zeros(0, 0).double()) == Structure((), None, None, ())
    assert structure_of(torch.diag(torch.tensor([0.0, 4.0])).double()).consecutive_cosines == (None,)
    assert structure_of(torch.zeros(2, 2).double()).stable_rank is None


def test_a_sketch_keeps_inner_products() -> None:
    """A quarter of the columns; the error of K over ‖x‖ ‖y‖ is within a few times √2 / √buckets, and the seed decides."""
    gradients = random_rows(6)
    sketch = rows_of(gradients, limit=6 * 4 * 50)
    assert not sketch.exact and sum(sketch.buckets.values()) <= 50
    for name, gram in sketch.grams().items():
        exact = part(gradients, name) @ part(gradients, name).T
        scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
        assert np.abs((gram.numpy() - exact) / scale).max() < SKETCH_ERRORS * math.sqrt(2 / sketch.buckets[name])
        assert torch.equal(gram, rows_of(gradients, limit=6 * 4 * 50).grams()[name])


def test_cosine_with_the_last_gradient() -> None:
    """Zero and non-finite gradients are passed over: the next one meets the last that was neither."""
    first, second = random_rows(2)
    cosine = ConsecutiveCosine(first)
    assert cosine.next(first) is None
    assert cosine.next(torch.zeros_like(first)) is None
    assert cosine.next(torch.full_like(first, math.nan)) is None
    expected = float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))
    assert cosine.next(second) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(cosine.last, second)
