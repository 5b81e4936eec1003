"""export_adapter against matrices by hand and against PEFT's arithmetic; what is refused."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops import export_adapter as op

MODULES = ((3, 5, 7), (0, 8, 9), (1, 16, 1), (17, 33, 30))
"""Rank, inputs, outputs."""
SCALES = (0.7, 1.0, 2.0, 32 / 17)


def adapter() -> tuple[torch.Tensor, list[list[int]]]:
    """(buffer, the op's lists): first every A, then every Bᵀ, gaps of 3."""
    a_offsets, b_offsets, end = [], [], 0
    for offsets, width in ((a_offsets, 1), (b_offsets, 2)):
        for module in MODULES:
            offsets.append(end)
            end += module[0] * module[width] + 3
    return torch.randn(end), [a_offsets, b_offsets, *([m[i] for m in MODULES] for i in range(3))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_rank", [None, 17, 64])
def test_every_module_is_where_the_sampler_wants_it(out_rank: int | None, dtype: torch.dtype) -> None:
    """x Aᵀ Bᵀ with the exported matrices and no scale is s x A_mᵀ B_mᵀ with the packed ones."""
    flat, lists = adapter()
    out_a, out_b = op.export_adapter(flat, *lists, SCALES, out_rank, dtype)
    for (r, d, n), a_offset, b_offset, scale in zip(MODULES, *lists[:2], SCALES, strict=True):
        padded = r if out_rank is None else out_rank
        a_rd, out_a = out_a[: padded * d].view(padded, d), out_a[padded * d :]
        b_nr, out_b = out_b[: padded * n].view(n, padded), out_b[padded * n :]
        assert torch.equal(a_rd[:r], flat[a_offset:][: r * d].view(r, d).to(dtype)) and not a_rd[r:].any()
        assert torch.equal(b_nr[:, :r], (torch.tensor(scale) * flat[b_offset:][: r * n].view(r, n).T).to(dtype)) and not b_nr[:, r:].any()
    assert not len(out_a) and not len(out_b)


def test_no_module_at_all() -> None:
    assert [len(x) for x in op.export_adapter(torch.randn(4), [], [], [], [], [], [], 8, torch.bfloat16)] == [0, 0]


@pytest.mark.parametrize(
    ("offset", "out_rank", "message"),
    [(0, 16, "module 3 has rank 17, more than out_rank 16"), (5000, 32, "module 0 of rank 3 leads outside of the buffer")],
)
def test_what_does_not_fit_is_refused(offset: int, out_rank: int, message: str) -> None:
    flat, lists = adapter()
    lists[1] = [b + offset for b in lists[1]]
    with pytest.raises(ValueError, match=f"export_adapter: {message}"):
        op.export_adapter(flat, *lists, SCALES, out_rank, torch.bfloat16)
