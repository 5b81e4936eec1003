"""Rank components and ‖∂L/∂ΔW‖ against autograd on the merged weights and against projections from torch.linalg.pinv in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastlora.config import LoraConfig
from fastlora.gradient_profile import delta_w_norms, estimate_norms, rank_component_norms
from fastlora.lora.groups import projections, shapes
from fastlora.lora.packed import PackedAdapter, attach
from fastlora.lora.patterns import resolve
from fastlora.ops.adamw_step import gradient_norms, segment_table
from tests.tiny import make_tiny_model
from tests.tolerances import FP32_PROFILE, FP64_EXACT

RANKS = LoraConfig(r=3, lora_alpha=5.0, rank_pattern={"q_proj": 17, "k_proj": 0, "up_proj": 1, "down_proj": 64})
"""k_proj has no adapter; down_proj's A is [64, 96]."""


def estimated(a_rd: Tensor, g_nd: Tensor, scale: float) -> float:
    db_nr = scale * g_nd @ a_rd.t()
    one = a_rd.new_tensor([1.0])
    return float(estimate_norms((a_rd @ a_rd.t())[None], (db_nr.t() @ db_nr)[None], scale * one, a_rd.shape[1] * one))


@pytest.mark.parametrize(("r", "d", "n"), [(1, 5, 3), (3, 8, 1), (17, 63, 9), (64, 64, 7), (8, 5, 4)])
def test_the_part_in_the_row_space_of_a_is_exact(r: int, d: int, n: int) -> None:
    """r > d among them: A then sees everything."""
    generator = torch.Generator().manual_seed(r)
    a_rd = torch.randn(r, d, generator=generator, dtype=torch.float64)
    if r == d:  # well conditioned, or its smallest direction is cut
        a_rd += 20 * torch.eye(d, dtype=torch.float64)
    g_nd = torch.randn(n, d, generator=generator, dtype=torch.float64)
    projected = float(torch.linalg.norm(g_nd @ torch.linalg.pinv(a_rd) @ a_rd))
    assert estimated(a_rd, g_nd, 1.7) == pytest.approx(math.sqrt(d / min(r, d)) * projected, rel=FP64_EXACT)
    if r >= d:
        assert estimated(a_rd, g_nd, 1.7) == pytest.approx(float(torch.linalg.norm(g_nd)), rel=FP64_EXACT)


@pytest.mark.parametrize("rank_of_g", [1, 6])
def test_the_square_is_unbiased_over_fresh_a(rank_of_g: int) -> None:
    """4,000 Kaiming-uniform A [5, 24]; the interval is four standard errors of their mean."""
    seeds, r, d, n = 4000, 5, 24, 11
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    g_nd = torch.randn(n, rank_of_g, **draw) @ torch.randn(rank_of_g, d, **draw)
    a_mrd = (2 * torch.rand(seeds, r, d, **draw) - 1) / math.sqrt(d)
    db_mnr = 0.5 * g_nd @ a_mrd.mT
    estimates = estimate_norms(a_mrd @ a_mrd.mT, db_mnr.mT @ db_mnr, torch.full((seeds,), 0.5), torch.full((seeds,), float(d)))
    squares = estimates**2 / torch.linalg.norm(g_nd) ** 2
    error = float(squares.std()) / math.sqrt(seeds)
    assert abs(float(squares.mean()) - 1) < 4 * error < 0.05
    if rank_of_g == 1:
        assert float(squares.std()) == pytest.approx(math.sqrt(2 / r * (1 - r / d) / (1 + 2 / d)), rel=0.1), "the spread of a Beta variable"


def test_a_rank_deficient_a_counts_the_directions_that_it_has() -> None:
    """A doubled row adds no direction; a row of zeros neither."""
    generator = torch.Generator().manual_seed(0)
    a_rd, g_nd = torch.randn(3, 20, generator=generator), torch.randn(4, 20, generator=generator)
    expected = estimated(a_rd, g_nd, 2.0)
    for odd in (torch.cat([a_rd, a_rd[:1]]), torch.cat([a_rd, -0.3 * a_rd]), torch.cat([a_rd, torch.zeros(2, 20)])):
        assert estimated(odd, g_nd, 2.0) == pytest.approx(expected, rel=FP32_PROFILE)


def test_what_cannot_be_estimated_is_nan_and_spoils_nothing_else() -> None:
    gram = torch.eye(2).repeat(4, 1, 1)
    gram_a, gram_b = gram.clone(), gram.clone()
    gram_a[0], gram_a[1, 0, 0], gram_b[2, 1, 1] = 0.0, math.inf, math.nan
    norms = estimate_norms(gram_a, gram_b, torch.ones(4), torch.full((4,), 6.0))
    assert norms.isnan().tolist() == [True, True, True, False]
    assert float(norms[3]) == pytest.approx(math.sqrt(6 / 2 * 2))


def adapted(freeze_a: bool = False, masked: bool = False) -> tuple[nn.Module, PackedAdapter]:
    """A tiny Llama with uneven ranks and B ≠ 0, its gradient accumulated over one loss."""
    model = make_tiny_model()
    specs = resolve(shapes(projections(model)), RANKS)
    layers = projections(model)
    mask = {spec.name: torch.ones(layers[spec.name].out_features, spec.rank, dtype=torch.bool) for spec in specs if spec.rank}
    adapter = attach(model, specs, seed=3, freeze_a=freeze_a, b_mask_nr=mask if masked else None, cast_to_input=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in adapter.slots:
            adapter.b_rn(name).copy_(0.02 * torch.randn(adapter.b_rn(name).shape, generator=generator))
    loss_of(model).backward()
    return model, adapter


def loss_of(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 66).view(1, 63)
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("freeze_a", [False, True])
def test_delta_w_norms_of_a_model_against_autograd_of_the_merged_weights(freeze_a: bool) -> None:
    _, adapter = adapted(freeze_a)
    merged = make_tiny_model()
    layers = projections(merged)
    with torch.no_grad():
        for name, slot in adapter.slots.items():
            layers[name].weight += slot.scale * adapter.b_rn(name).t() @ adapter.a_rd(name)
    loss_of(merged).backward()
    norms_m = delta_w_norms(adapter)
    assert norms_m is not None
    for segment, norm in zip(adapter.flat.segments, norms_m.tolist(), strict=True):
        module, _, matrix = segment.name.rpartition(".lora_")
        if matrix == "A":
            assert math.isnan(norm)
            continue
        a_rd, g_nd = adapter.a_rd(module).double(), layers[module].weight.grad
        assert g_nd is not None
        r, d = a_rd.shape
        projected = torch.linalg.norm(g_nd.double() @ torch.linalg.pinv(a_rd) @ a_rd)
        assert norm == pytest.approx(math.sqrt(d / r) * float(projected), rel=FP32_PROFILE), module
    assert len(norms_m) == (1 if freeze_a else 2) * 2 * 6, "two layers, six projections"


def test_under_a_mask_there_is_no_estimate() -> None:
    assert delta_w_norms(adapted(masked=True)[1]) is None


def test_rank_components_are_the_rows_of_da_and_the_columns_of_db() -> None:
    _, adapter = adapted()
    flat = adapter.flat
    norms = rank_component_norms(flat).split([segment.shape[0] for segment in flat.segments])
    for segment, of_rows in zip(flat.segments, norms, strict=True):
        matrix = flat.grad[segment.offset :][: segment.numel].double().view(segment.shape)
        expected = [math.sqrt(sum(float(value) ** 2 for value in row)) for row in matrix]
        assert of_rows.tolist() == pytest.approx(expected, rel=FP32_PROFILE)
    together = torch.stack([torch.linalg.vector_norm(of_rows) for of_rows in norms])
    norms_m = gradient_norms(flat.grad, segment_table(flat.segments, None), None)
    torch.testing.assert_close(together, norms_m, rtol=FP32_PROFILE, atol=0)
    assert float(norms_m.min()) > 0
