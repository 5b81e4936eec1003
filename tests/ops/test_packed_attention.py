"""packed_attention against dense softmax attention in fp64, written out with a mask from first principles and differentiated by torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastlora.ops.packed_attention import packed_attention, packed_attention_backward_op, packed_attention_op, visible_pairs
from fastlora.ops.registry import ImplementationError, use_implementation
from tests.ops.implementations import CPP, Variant, assert_no_worse, needs_extension, relative_error, running, threads
from tests.tolerances import FP64_EXACT, LONG_SUMS_IN_FLOAT32, SAME_IN_FLOAT32

RAGGED = (
    ((17, 0, 1, 3, 130), (0, 0, 0, 0, 0)),  # lengths, roots: a prompt and its completions
    ((0, 48, 49), (0, 0, 0)),  # a root without tokens
    ((130, 63, 17), (0, 0, 0)),
    ((63,), (0,)),  # a sequence of its own
    ((0,), (0,)),
    ((48,), (0,)),
    ((1, 49), (0, 0)),
)


@dataclass(frozen=True)
class Problem:
    """Inputs and the gradient of the output; cos and sin are None without a rotation."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cos: Tensor | None
    sin: Tensor | None
    cu_seqlens: list[int]
    roots: list[int]
    head_dim: int
    scaling: float

    def to(self, dtype: torch.dtype) -> Problem:
        tensors = {name: getattr(self, name) for name in ("q", "k", "v", "dout", "cos", "sin")}
        return replace(self, **{name: None if x is None else x.to(dtype) for name, x in tensors.items()})

    def gradients(self, out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out, leaves, self.dout)]

    def ours(self) -> list[Tensor]:
        """out, dq, dk, dv."""
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        tables = {"cos_te": self.cos, "sin_te": self.sin}
        out = packed_attention(*leaves, self.cu_seqlens, self.roots, head_dim=self.head_dim, scaling=self.scaling, **tables)
        return self.gradients(out, leaves)

    def dense(self) -> list[Tensor]:
        """The same from softmax(scaling q kᵀ) v over all tokens, under `_visible`."""
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        q_the, k_the, v_the = (x.reshape(len(x), x.shape[1] // self.head_dim, self.head_dim) for x in leaves)
        q_the, k_the = (self._rotated(x) for x in (q_the, k_the))
        shared_by = q_the.shape[1] // k_the.shape[1]
        k_the, v_the = (x.repeat_interleave(shared_by, dim=1) for x in (k_the, v_the))
        scores_hij = torch.einsum("ihe,jhe->hij", q_the, k_the) * self.scaling
        p_hij = scores_hij.masked_fill(~_visible(self.cu_seqlens, self.roots), -torch.inf).softmax(-1)
        return self.gradients(torch.einsum("hij,jhe->ihe", p_hij, v_the).reshape(self.q.shape), leaves)

    def _rotated(self, x_the: Tensor) -> Tensor:
        """Element j of the first half and of the second are one point of a plane, turned by the token's angle."""
        if self.cos is None or self.sin is None:
            return x_the
        half = self.head_dim // 2
        first, second = x_the[..., :half], x_the[..., half:]
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.cat([first * cos[..., :half] - second * sin[..., :half], second * cos[..., half:] + first * sin[..., half:]], -1)


def _visible(cu_seqlens: Sequence[int], roots: Sequence[int]) -> Tensor:
    """bool [i, j]: token i sees j when j is not after i in its own segment, or anywhere in the root of its segment."""
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    segment_of = [s for s, length in enumerate(lengths) for _ in range(length)]
    rows = [[(s == s_j and j <= i) or (s != s_j and roots[s] == s_j) for j, s_j in enumerate(segment_of)] for i, s in enumerate(segment_of)]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(rows))


def _layout(families: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[list[int], list[int]]:
    """(cu_seqlens, roots) of families one after another."""
    cu_seqlens, roots = [0], []
    for lengths, family_roots in families:
        first = len(roots)
        roots += [first + root for root in family_roots]
        for length in lengths:
            cu_seqlens.append(cu_seqlens[-1] + length)
    return cu_seqlens, roots


def _problem(
    families: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    heads: int = 3,
    key_heads: int = 1,
    head_dim: int = 32,
    rotated: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    cu_seqlens, roots = _layout(families)
    t = cu_seqlens[-1]
    widths = (heads, key_heads, key_heads, heads)
    q, k, v, dout = (torch.randn(t, n * head_dim, dtype=torch.float64).to(dtype) for n in widths)
    # The halves of the tables differ, which no model's do: so a half taken for the other is seen.
    cos, sin = (torch.randn(t, head_dim, dtype=torch.float64).to(dtype) if rotated else None for _ in range(2))
    return Problem(q, k, v, dout, cos, sin, cu_seqlens, roots, head_dim, head_dim**-0.5 / (1 + rotated))


@cache
def _ragged(head_dim: int, rotated: bool, key_heads: int, dtype: torch.dtype) -> tuple[Problem, list[Tensor], list[Tensor]]:
    """(problem, dense attention in its dtype, the truth in fp64); the dense ones once for all variants. 3 query heads on 1, or 4 on 2."""
    torch.manual_seed(head_dim)
    problem = _problem(RAGGED, heads=2 + key_heads, key_heads=key_heads, head_dim=head_dim, rotated=rotated, dtype=dtype)
    return problem, problem.dense(), problem.to(torch.float64).dense()


@cache
def _long(dtype: torch.dtype) -> tuple[Problem, list[Tensor], list[Tensor]]:
    """As `_ragged`, by the reference implementation: the tests of fp64 compare it with the dense form, which would take a gigabyte here."""
    torch.manual_seed(0)
    problem = _problem([((3, 7), (0, 0)), ((3000, 1, 5, 2), (0, 0, 0, 0)), ((2,), (0,))], dtype=dtype)
    with use_implementation("reference"):
        return problem, problem.ours(), problem.to(torch.float64).ours()


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("head_dim", [2, 24, 32])
def test_is_dense_attention_in_fp64(head_dim: int, rotated: bool, key_heads: int) -> None:
    problem, expected, _ = _ragged(head_dim, rotated, key_heads, torch.float64)
    for got, truth in zip(problem.ours(), expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=0, atol=FP64_EXACT * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rotated", "key_heads"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("variant", CPP, ids=str)
def test_error_is_no_worse_than_dense_attentions(
    variant: Variant, head_dim: int, rotated: bool, key_heads: int, dtype: torch.dtype
) -> None:
    problem, plain, truth = _ragged(head_dim, rotated, key_heads, dtype)
    with running(variant):
        got = problem.ours()
    assert_no_worse(got, plain, truth)


@pytest.mark.parametrize("variant", CPP, ids=str)
@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 15, 16, 17, 47, 48, 49, 95, 96, 97])
def test_every_remainder_of_a_block(length: int, variant: Variant) -> None:
    """Rows of a tile (4 or 6), vectors (4 to 16 keys) and blocks of queries (48): alone, as a root and after a root."""
    # The first sequence gives the gradients a size: those of two tokens alone are differences of nearly equal numbers.
    families = [((40,), (0,)), ((length,), (0,)), ((length, 3), (0, 0)), ((5, length, length), (0, 0, 0))]
    for dtype in (torch.float32, torch.bfloat16):
        problem = _problem(families, heads=2, key_heads=2, dtype=dtype)
        with running(variant):
            got = problem.ours()
        assert_no_worse(got, problem.dense(), problem.to(torch.float64).dense())


@pytest.mark.parametrize("variant", CPP, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_root_with_short_children(dtype: torch.dtype, variant: Variant) -> None:
    problem, plain, truth = _long(dtype)
    with running(variant):
        got = problem.ours()
    if dtype == torch.bfloat16:
        assert_no_worse(got, plain, truth)
    else:
        assert max(map(relative_error, got, truth)) < LONG_SUMS_IN_FLOAT32


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", CPP, ids=str)
def test_log_sum_exp(variant: Variant, dtype: torch.dtype) -> None:
    """What forward hands to backward: [H, t] in float32, every entry written."""
    problem, _, _ = _ragged(32, False, 1, dtype)
    layout = (problem.cu_seqlens, problem.roots, problem.head_dim, problem.scaling)
    with running(variant), torch.no_grad():
        _, lse_ht = packed_attention_op(problem.q, problem.k, problem.v, None, None, *layout)
    wide = problem.to(torch.float64)
    q_the = wide.q.view(len(wide.q), -1, problem.head_dim)
    scores_hij = torch.einsum("ihe,je->hij", q_the, wide.k) * problem.scaling
    truth = scores_hij.masked_fill(~_visible(problem.cu_seqlens, problem.roots), -torch.inf).logsumexp(-1)
    assert lse_ht.dtype == torch.float32
    torch.testing.assert_close(lse_ht.double(), truth, rtol=0, atol=SAME_IN_FLOAT32)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("key_heads", [1, 3])
def test_sharing_the_prompt_changes_nothing(key_heads: int, rotated: bool) -> None:
    """fp64: prompt and completions as one family, or every prompt + completion as a sequence of its own; out and all gradients.

    A token of the prompt has as many copies as there are completions. Its output counts once (that of the first copy); its
    gradients add up over the copies, which is what indexing does.
    """
    shared = _problem([((17, 5, 49, 0, 3), (0,) * 5), ((1, 63, 2), (0,) * 3)], key_heads=key_heads, rotated=rotated)
    tokens, cu_seqlens, first_copy = [], [0], torch.zeros(0, dtype=torch.bool)
    for segment, root in enumerate(shared.roots):
        if segment == root:
            continue
        prompt, own = (range(shared.cu_seqlens[s], shared.cu_seqlens[s + 1]) for s in (root, segment))
        tokens += [*prompt, *own]
        cu_seqlens.append(len(tokens))
        counts = torch.cat([torch.full((len(prompt),), segment == root + 1), torch.ones(len(own), dtype=torch.bool)])
        first_copy = torch.cat([first_copy, counts])
    place = torch.tensor(tokens)
    leaves = [x.detach().requires_grad_() for x in (shared.q, shared.k, shared.v)]
    tables = {} if shared.cos is None else {"cos_te": shared.cos[place], "sin_te": shared.sin[place]}
    alone = packed_attention(
        *(x[place] for x in leaves),
        cu_seqlens,
        list(range(len(cu_seqlens) - 1)),
        head_dim=shared.head_dim,
        scaling=shared.scaling,
        **tables,
    )
    out = torch.zeros_like(shared.q).index_add(0, place[first_copy], alone[first_copy])
    for got, expected in zip(shared.ours(), shared.gradients(out, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=FP64_EXACT * float(expected.abs().max()))


@pytest.mark.parametrize("variant", [Variant("reference"), *CPP], ids=str)
def test_any_memory_layout(variant: Variant) -> None:
    """q, k and v cut out of one projection; transposed; and an expanded gradient."""
    problem = _problem([((20, 30), (0, 0))], heads=2, key_heads=2, dtype=torch.float32)
    wide = torch.cat([problem.q, problem.k, problem.v], 1)
    dout = torch.ones(()).expand(50, 64)
    sliced = replace(problem, q=wide[:, :64], k=wide[:, 64:128], v=wide[:, 128:], dout=dout)
    turned = replace(problem, **{name: getattr(problem, name).t().contiguous().t() for name in ("q", "k", "v", "cos", "sin")}, dout=dout)
    with running(variant):
        expected = replace(problem, dout=dout.contiguous()).ours()
        for strided in (sliced, turned):
            assert not strided.k.is_contiguous()
            torch.testing.assert_close(strided.ours(), expected, rtol=0, atol=10 * SAME_IN_FLOAT32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("variant", CPP, ids=str)
def test_nan_and_inf_reach_what_sees_them_and_no_other_family(variant: Variant, name: str, value: float) -> None:
    families = [((5, 7), (0, 0)), ((20, 60, 3), (0, 0, 0)), ((9,), (0,))]
    problem = _problem(families, rotated=False, dtype=torch.float32)
    spoilt = 12 + 11  # a token of the second family's root
    getattr(problem, name)[spoilt] = value
    with running(variant):
        out, *gradients = problem.ours()
    sees = _visible(problem.cu_seqlens, problem.roots)[:, spoilt] if name != "q" else torch.arange(len(out)) == spoilt
    assert not out[sees].isfinite().any(dim=1).all()
    assert all(not row.isfinite().all() for row in out[sees])
    others = [*range(12), *range(95, 104)]
    assert out[others].isfinite().all() and all(x[others].isfinite().all() for x in gradients)
    assert not gradients[0][spoilt].isfinite().all()


@pytest.mark.parametrize("variant", CPP, ids=str)
def test_far_apart_scores(variant: Variant) -> None:
    """Scores of ±1e4, where most probabilities are exactly 0 and none may be NaN."""
    problem = _problem(RAGGED[:3], rotated=False, dtype=torch.float32)
    problem = replace(problem, q=100 * problem.q, k=100 * problem.k)
    with running(variant):
        got = problem.ours()
    assert_no_worse(got[:1], problem.dense()[:1], problem.to(torch.float64).dense()[:1])
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("variant", CPP, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_on_what_ran_before(dtype: torch.dtype, variant: Variant) -> None:
    """A thread keeps its memory between calls: a larger problem before must leave no trace."""
    problem = _problem(RAGGED, heads=3, key_heads=3, dtype=dtype)
    with running(variant):
        first = problem.ours()
        larger = _problem([((200, 70), (0, 0))], head_dim=128, dtype=dtype)
        replace(larger, q=larger.q * torch.nan).ours()
        for count in (1, 2):
            with threads(count):
                assert all(map(torch.equal, problem.ours(), first))


@needs_extension
@pytest.mark.parametrize(("forward", "backward"), [("reference", "auto"), ("cpp", "reference")])
def test_forward_and_backward_by_different_implementations(forward: str, backward: str) -> None:
    """The reference keeps no log-sum-exp: C++ must not read what is not there."""
    problem = _problem(RAGGED[:3], dtype=torch.float32)
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    layout = {"head_dim": 32, "scaling": problem.scaling, "cos_te": problem.cos, "sin_te": problem.sin}
    with use_implementation(forward):
        out = packed_attention(*leaves, problem.cu_seqlens, problem.roots, **layout)
    if forward == "reference":
        with use_implementation("cpp"), pytest.raises(ImplementationError, match=r"packed_attention_backward: .* it needs the log-sum-exp"):
            torch.autograd.grad(out, leaves, problem.dout, retain_graph=True)
    with use_implementation(backward):
        got = problem.gradients(out, leaves)
    assert_no_worse(got, problem.dense(), problem.to(torch.float64).dense())


@needs_extension
def test_cpp_refuses_a_head_width_by_name() -> None:
    problem = _problem(RAGGED[:1], head_dim=24, dtype=torch.float32)
    message = "^packed_attention: implementation 'cpp' .* a head width that is a multiple of 32, not 24"
    with use_implementation("cpp"), pytest.raises(ImplementationError, match=message):
        problem.ours()
    assert_no_worse(problem.ours(), problem.dense(), problem.to(torch.float64).dense())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": [0, 3, 7]}, "do not fit"),
        ({"cu_seqlens": [1, 3, 8]}, "do not fit"),
        ({"cu_seqlens": []}, "do not fit"),
        ({"cu_seqlens": [0, 12, 8]}, r"cu_seqlens \[0, 12, 8\] do not fit"),
        ({"roots": [0]}, "1 roots"),
        ({"k_td": torch.zeros(7, 32)}, r"k \(7, 32\)"),
        ({"v_td": torch.zeros(8, 64)}, r"v \(8, 64\)"),
        ({"head_dim": 48}, "heads of width 48"),
        ({"k_td": torch.zeros(8, 64), "v_td": torch.zeros(8, 64)}, "widths 96 and 64 are not heads"),
        ({"roots": [0, 5]}, r"roots \[0, 5\]"),
        ({"cu_seqlens": [0, 2, 4, 8], "roots": [0, 1, 0]}, r"roots \[0, 1, 0\]: segments that share a root must follow it"),
        ({"sin_te": torch.zeros(8, 32)}, r"cos_te and sin_te are None and \(8, 32\)"),
        ({"cos_te": torch.zeros(2, 32), "sin_te": torch.zeros(2, 32)}, r"both must be \(8, 32\), or None"),
    ],
    ids=str,
)
def test_refuses_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    arguments = {"q_td": torch.zeros(8, 96), "k_td": torch.zeros(8, 32), "v_td": torch.zeros(8, 32), "cu_seqlens": [0, 5, 8]}
    arguments |= {"roots": [0, 0], "head_dim": 32, "scaling": 1.0}
    with pytest.raises(ValueError, match=f"packed_attention: .*{message}"):
        packed_attention(**{**arguments, **changes})


@needs_extension
def test_the_kernels_check_what_they_read() -> None:
    """Past the public function's checks: an error, never memory that is not theirs."""
    q, k = torch.zeros(8, 64), torch.zeros(8, 32)
    layout = ([0, 5, 8], [0, 0], 32, 1.0)
    tables = (torch.zeros(8, 32),) * 2
    with use_implementation("cpp"):
        out, lse = packed_attention_op(q, k, k, *tables, *layout)
        for inputs in (
            (q, k[:7], k[:7], *tables),
            (q, k, k[:, :16], *tables),
            (q, k, k, tables[0], None),
            (q, k, k, tables[0][:2], tables[1]),
        ):
            with pytest.raises(RuntimeError, match="packed_attention: "):
                packed_attention_op(*inputs, *layout)
        for cu_seqlens in ([0, 12, 8], [2, 5, 8], [0, 8]):
            with pytest.raises(RuntimeError, match="packed_attention: cu_seqlens"):
                packed_attention_op(q, k, k, *tables, cu_seqlens, [0, 0], 32, 1.0)
        for dout, kept in ((out[:7], lse), (out, lse[:1])):
            with pytest.raises(RuntimeError, match="packed_attention: "):
                packed_attention_backward_op(dout, q, k, k, *tables, out, kept, *layout)


def test_visible_pairs_counts_the_mask() -> None:
    layout = _layout(RAGGED)
    assert visible_pairs(*layout) == int(_visible(*layout).sum())
