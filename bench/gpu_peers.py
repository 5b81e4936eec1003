"""Races against other libraries, forward and backward together: a LoRA group, the head's log-probabilities and losses, the optimizer.

| race | entrants besides ours |
|---|---|
| `lora_group_step` | torch eager, torch.compile, PEFT's layers |
| `head_logprob_step` | torch eager, torch.compile, TRL's chunked log-prob (Triton on a GPU) |
| `head_cross_entropy_step` | torch eager, torch.compile, Liger's fused linear cross-entropy, cut-cross-entropy |
| `head_grpo_step` | TRL's chunked log-prob under our loss, Liger's fused linear GRPO loss |
| `adamw_tensors` | torch's fused and foreach AdamW on PEFT's tensors, bitsandbytes' AdamW in 32 and 8 bits |

Gradients are those of the input (and of A and B): the head is frozen. All entrants get the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu_race import Canonical, Entrant, Race, Refuses, Run, needs, on_a_gpu
from bench.op_cases import Case, Update, adapter_segments, cases
from fastlora.config import LossConfig, OptimConfig
from fastlora.losses.one_pass import one_pass_loss
from fastlora.losses.policy import policy_loss
from fastlora.ops import adamw_step, linear_logprob, lora_linear
from fastlora.ops.registry import dispatchers, use_implementation
from fastlora.packing import PackedTokens
from fastlora.types import TrainBatch

TRL_CHUNK = 32768
"""Vocabulary entries of TRL's tile (trl/trainer/utils.py, _CHUNKED_LOGPROB_CHUNK_SIZE)."""
TEMPERATURE = 0.9
ACCUMULATED = 0.01
"""Of a loss: what bfloat16 leaves of a mean over some thousand tokens."""


def peer_races(update: Update, dtype: torch.dtype) -> Iterator[Race]:
    """All of them at the sizes of `update`."""
    found = {case.name: case for case in cases(update)}
    for case in found.values():
        if case.spec is lora_linear.SPEC:
            yield group_race(case, found[case.name.replace("lora_linear", "lora_linear_backward")], dtype)
    (head,) = (case for case in found.values() if case.spec is linear_logprob.SPEC)
    yield from head_races(head, update, dtype)
    yield optimizer_race(update)


def ours(op: str, prepare: Callable[[], tuple[Run, Canonical]]) -> list[Entrant]:
    """An entrant for each implementation of the op."""
    entrants = []
    for name, implementation in dispatchers[op].implementations.items():

        def forced(name: str = name) -> tuple[Run, Canonical]:
            run, canonical = prepare()

            def inside() -> Any:
                with use_implementation(name):
                    return run()

            return inside, canonical

        entrants.append(Entrant(f"fastlora {name}", forced, implementation.refuses))
    return entrants


# A group of projections


def group_race(case: Case, backward: Case, dtype: torch.dtype) -> Race:
    """Outputs, and the gradients of x, A and B, of one group."""
    arguments = _on_meta(case, dtype)
    costs = [case.spec.cost(*arguments), backward.spec.cost(*_on_meta(backward, dtype))]

    def problem(wider: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor, Tensor, list[int], list[float], list[Tensor]]:
        x, weights, _, a_rd, b_flat, _, ranks, scales, _ = case.arguments(dtype)
        x, a_rd, b_flat = (t.to(wider).requires_grad_() for t in (x, a_rd, b_flat))
        dys = [F.linear(x.detach(), w.to(wider)).to(dtype).cos().to(wider) for w in weights]
        return x, [w if wider == dtype else w.to(wider) for w in weights], a_rd, b_flat, ranks, scales, dys

    def entrant(forward: Callable[..., list[Tensor]], wider: torch.dtype = dtype) -> tuple[Run, Canonical]:
        x, weights, a_rd, b_flat, ranks, scales, dys = problem(wider)

        def run() -> tuple[Tensor, ...]:
            ys = forward(x, weights, a_rd, b_flat, ranks, scales)
            return (*(y.detach() for y in ys), *torch.autograd.grad(ys, (x, a_rd, b_flat), dys))

        return run, list

    def truth() -> list[Tensor]:
        run, canonical = entrant(_group_by_formula, torch.float32 if dtype != torch.float32 else torch.float64)
        return canonical(run())

    def through_op(x: Tensor, weights: list[Tensor], a_rd: Tensor, b_flat: Tensor, *layout: Any) -> list[Tensor]:
        return lora_linear.lora_linear(x, weights, [None] * len(weights), a_rd, b_flat, *layout)

    entrants = [
        *ours("lora_linear", lambda: entrant(through_op)),
        Entrant("torch eager", lambda: entrant(_group_by_formula)),
        Entrant("torch.compile", lambda: entrant(torch.compile(_group_by_formula, dynamic=False)), on_a_gpu),
        Entrant("PEFT layers", lambda: _peft_group(problem(dtype)), needs("peft", "peft", gpu=False)),
    ]
    products = case.gemms + backward.gemms
    work = (sum(c.flops for c in costs), sum(c.bytes for c in costs))
    return Race("lora_group_step", case.shape, dtype, *work, products, truth, entrants, "torch eager")


def _on_meta(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    with torch.device("meta"), torch.no_grad():
        return case.arguments(dtype)


def _group_by_formula(
    x: Tensor, weights: Sequence[Tensor], a_rd: Tensor, b_flat: Tensor, ranks: Sequence[int], scales: Sequence[float]
) -> list[Tensor]:
    """Module by module, as PEFT's layers compute it."""
    parts = b_flat.split([len(w) * r for w, r in zip(weights, ranks, strict=True)])
    factors = zip(weights, a_rd.split(list(ranks)), parts, ranks, scales, strict=True)
    return [F.linear(x, w) + F.linear(x, a) @ b.view(r, len(w)) * s for w, a, b, r, s in factors]


def _peft_group(problem: tuple[Any, ...]) -> tuple[Run, Canonical]:
    """peft.tuners.lora.Linear over frozen nn.Linear layers, adapters in the dtype of x."""
    import peft
    from peft.tuners.lora import Linear

    x, weights, a_rd, b_flat, ranks, scales, dys = problem
    layers, leaves = [], [x]
    parts = b_flat.detach().split([len(w) * r for w, r in zip(weights, ranks, strict=True)])
    for w, a, b, r, s in zip(weights, a_rd.detach().split(ranks), parts, ranks, scales, strict=True):
        base = nn.Linear(*reversed(w.shape), bias=False, dtype=w.dtype)
        base.weight.data = w
        base.requires_grad_(False)
        layer = Linear(base, "default", peft.LoraConfig(r=r, lora_alpha=s * r), r=r, lora_alpha=s * r).to(x.dtype)
        layer.lora_A["default"].weight.data = a.clone()
        layer.lora_B["default"].weight.data = b.view(r, len(w)).t().contiguous()
        layers.append(layer)
    leaves += [layer.lora_A["default"].weight for layer in layers] + [layer.lora_B["default"].weight for layer in layers]

    def run() -> tuple[Tensor, ...]:
        ys = [layer(x) for layer in layers]
        return (*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys))

    def canonical(found: Sequence[Tensor]) -> list[Tensor]:
        count = len(layers)
        *outputs, dx = found[: count + 1]
        da, db = found[count + 1 : 2 * count + 1], found[2 * count + 1 :]
        return [*outputs, dx, torch.cat(list(da)), torch.cat([g.t().reshape(-1) for g in db])]

    return run, canonical


# The head


@dataclass(frozen=True, slots=True)
class Head:
    """Predicting rows of n completions of t tokens, and a frozen head."""

    hidden_td: Tensor
    weight_vd: Tensor
    targets_t: Tensor
    batch: TrainBatch
    """Advantages, and the log-probabilities of a behaviour policy near the present one."""

    def leaf(self, dtype: torch.dtype | None = None) -> Tensor:
        """The hidden states, to differentiate in."""
        return self.hidden_td.detach().to(dtype or self.hidden_td.dtype).clone().requires_grad_()


def head_problem(case: Case, update: Update, dtype: torch.dtype) -> Head:
    """Of the op's own case."""
    hidden_td, weight_vd, _, targets_t, *_ = case.arguments(dtype)
    n, t = update.samples, update.rows // update.samples
    with torch.no_grad():
        logp_t, *_ = dispatchers["linear_logprob"](
            hidden_td, weight_vd, None, targets_t, TEMPERATURE, False, update.tile_rows, len(weight_vd)
        )
    ones_nt = torch.ones(n, t, dtype=torch.bool)
    ids = torch.zeros(n, 1, dtype=torch.long)
    old_nt = logp_t.float().view(n, t) + 0.05 * logp_t.float().view(n, t).sin()
    advantages = torch.linspace(-0.5, 1, n)[:, None]  # not symmetric: their mean is the loss, and its relative error is judged
    policies = (advantages, old_nt, None, None, n * t)
    return Head(hidden_td, weight_vd, targets_t, TrainBatch(ids, ids.bool(), targets_t.view(n, t), ones_nt, ones_nt, *policies))


Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(hidden_td, weight_vd, targets_t) -> (logp_t, entropy_t), at TEMPERATURE."""


def _score_by_op(hidden_td: Tensor, weight_vd: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor]:
    return linear_logprob.linear_logprob(hidden_td, weight_vd, targets_t, temperature=TEMPERATURE)


def _score_by_formula(hidden_td: Tensor, weight_vd: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor]:
    z_tv = F.linear(hidden_td, weight_vd)
    log_p_tv = (z_tv.to(torch.promote_types(z_tv.dtype, torch.float32)) / TEMPERATURE).log_softmax(-1)
    return log_p_tv.gather(1, targets_t[:, None]).squeeze(1), -(log_p_tv.exp() * log_p_tv).sum(-1)


def _score_by_trl(hidden_td: Tensor, weight_vd: Tensor, targets_t: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logp_t, entropy_t, *_ = ChunkedLogProbFunction.apply(
        hidden_td, weight_vd, None, targets_t, TEMPERATURE, min(TRL_CHUNK, len(weight_vd)), None, 1.0, ("entropy",)
    )
    return logp_t, entropy_t


def head_races(case: Case, update: Update, dtype: torch.dtype) -> Iterator[Race]:
    """Log-probabilities, cross-entropy, GRPO."""
    arguments = _on_meta(case, dtype)
    t, (v, d) = update.rows, arguments[1].shape
    flops, nbytes = 6 * t * d * v, (3 * t * d + 2 * v * d) * dtype.itemsize  # logits, logits again, dh; W is read twice
    products = Counter([(t, d, v), (t, d, v), (t, v, d)])
    wide = torch.float32 if dtype != torch.float32 else torch.float64

    def problem() -> Head:
        return head_problem(case, update, dtype)

    def entrant(step: Callable[[Head, Tensor, Tensor], list[Tensor]], wider: torch.dtype = dtype) -> tuple[Run, Canonical]:
        """step(head, hidden leaf, weight) -> outputs, then one to differentiate with respect to the leaf."""
        head = problem()
        leaf, weight_vd = head.leaf(wider), head.weight_vd.to(wider)

        def run() -> list[Tensor]:
            *outputs, last = step(head, leaf, weight_vd)
            (dh,) = torch.autograd.grad(last, leaf)
            return [*(x.detach() for x in outputs), dh]

        return run, list

    def race(op: str, step_of: Callable[[Score], Callable[..., list[Tensor]]], entrants: Sequence[Entrant]) -> Race:
        def truth() -> list[Tensor]:
            run, canonical = entrant(step_of(_score_by_formula), wide)
            return canonical(run())

        own = ours("linear_logprob", lambda: entrant(step_of(_score_by_op)))
        eager = [
            Entrant("torch eager", lambda: entrant(step_of(_score_by_formula))),
            Entrant("torch.compile", lambda: entrant(step_of(torch.compile(_score_by_formula, dynamic=False))), on_a_gpu),
            Entrant("TRL chunked", lambda: entrant(step_of(_score_by_trl)), needs("trl", "trl", gpu=False)),
        ]
        return Race(op, case.shape, dtype, flops, nbytes, products, truth, [*own, *eager, *entrants], "torch eager", 2 * ACCUMULATED)

    yield race("head_logprob_step", _logprob_step, [])
    yield race(
        "head_cross_entropy_step",
        _cross_entropy_step,
        [
            Entrant("Liger fused CE", lambda: entrant(_liger_cross_entropy), needs("liger-kernel", "liger_kernel")),
            Entrant("cut-cross-entropy", lambda: entrant(_cut_cross_entropy), needs("cut-cross-entropy", "cut_cross_entropy")),
        ],
    )
    one_pass = [
        Entrant(e.name.replace("fastlora", "fastlora one pass"), e.prepare, e.refuses)
        for e in ours("logprob_rows", lambda: entrant(_one_pass_step))
    ]
    liger = Entrant("Liger fused GRPO", lambda: entrant(_liger_grpo), needs("liger-kernel", "liger_kernel", gpu=False))
    yield race("head_grpo_step", _grpo_step, [*one_pass, liger])


def _logprob_step(score: Score) -> Callable[..., list[Tensor]]:
    def step(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
        logp_t, entropy_t = score(leaf, weight_vd, head.targets_t)
        return [logp_t, entropy_t, (logp_t * head.batch.old_logp_nt.view(-1).cos()).sum()]

    return step


def _cross_entropy_step(score: Score) -> Callable[..., list[Tensor]]:
    def step(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
        loss = -score(leaf, weight_vd, head.targets_t)[0].mean()
        return [loss, loss]

    return step


def _grpo_loss(head: Head, logp_nt: Tensor, entropy_nt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    steps = {"accumulation_steps": 1, "steps_per_generation": 1, "max_completion_length": logp_nt.shape[1]}
    return policy_loss(logp_nt, entropy_nt, head.batch, LossConfig(), entropy_coef=0.0, **steps)


def _grpo_step(score: Score) -> Callable[..., list[Tensor]]:
    def step(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
        shape_nt = head.batch.loss_mask_nt.shape
        loss, _ = _grpo_loss(head, *(x.view(shape_nt) for x in score(leaf, weight_vd, head.targets_t)))
        return [loss, loss]

    return step


def _one_pass_step(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
    """Ours where the loss is token-level: logits once instead of twice."""
    cells, nowhere = torch.arange(len(leaf), device=leaf.device), head.targets_t[:0]
    packed = PackedTokens(nowhere, nowhere, (0,), (), nowhere, head.targets_t, cells, tuple(head.batch.loss_mask_nt.shape))
    loss, _ = one_pass_loss(leaf, weight_vd, None, packed, TEMPERATURE, lambda logp, entropy: _grpo_loss(head, logp, entropy))
    return [loss, loss]


def _liger_cross_entropy(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
    """Liger has no temperature: the hidden states are divided by it."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(leaf / TEMPERATURE, weight_vd, head.targets_t)
    return [loss, loss]


def _cut_cross_entropy(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(leaf / TEMPERATURE, weight_vd, head.targets_t)
    return [loss, loss]


def _liger_grpo(head: Head, leaf: Tensor, weight_vd: Tensor) -> list[Tensor]:
    """dapo with fastlora's defaults (and TRL's), a row of samples a chunk; its torch.compile on a GPU only."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    config, batch = LossConfig(), head.batch
    loss_of = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        compiled=leaf.device.type == "cuda",
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon,
        loss_type="dapo",
        temperature=TEMPERATURE,
    )
    n, t = batch.loss_mask_nt.shape
    loss, _ = loss_of(
        leaf.view(n, t, -1),
        weight_vd,
        batch.completion_ids_nt,
        batch.loss_mask_nt,
        batch.advantages_nt.squeeze(1),
        old_per_token_logps=batch.old_logp_nt,
        num_items_in_batch=batch.num_items_in_batch,
    )
    return [loss, loss]


# The optimizer


def optimizer_race(update: Update) -> Race:
    """One AdamW step on all A and B, float32; canonical: the change of the parameters, in the order of the segments, PEFT's layout."""
    segments = adapter_segments(update.model, update.rank)
    size, config = segments[-1].offset + segments[-1].numel, OptimConfig()
    table = adamw_step.segment_table(segments, None)
    lr = 1e-2
    options = {"lr": lr, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0}

    def buffers() -> tuple[Tensor, Tensor]:
        wave = torch.arange(size, dtype=torch.float32)
        return wave.sin(), (1.7 * wave).cos()

    def flat() -> tuple[Run, Canonical]:
        param, grad = buffers()
        before, moments, clip = param.clone(), [torch.zeros_like(param) for _ in range(2)], torch.tensor(1.0)

        def run() -> Tensor:
            adamw_step.adamw_step(param, grad, *moments, table, None, clip_coef=clip, step=1, **options)
            return param

        return run, lambda moved: [moved - before]

    def library(make: Callable[[list[Tensor]], Any]) -> tuple[Run, Canonical]:
        param, grad = buffers()
        tensors = [nn.Parameter(param[s.offset :][: s.numel].view(s.shape).clone()) for s in segments]
        for s, tensor in zip(segments, tensors, strict=True):
            tensor.grad = grad[s.offset :][: s.numel].view(s.shape).clone()
        optimizer = make(tensors)

        def run() -> list[nn.Parameter]:
            optimizer.step()
            return tensors

        return run, lambda moved: [torch.cat([tensor.detach().reshape(-1) for tensor in moved]) - param]

    def truth() -> list[Tensor]:
        """A first step from zero moments: −lr g / (|g| + ε)."""
        _, grad = buffers()
        return [-lr * grad.double() / (grad.double().abs() + config.eps)]

    def of_bitsandbytes(name: str) -> Callable[[list[Tensor]], Any]:
        def make(tensors: list[Tensor]) -> Any:
            import bitsandbytes

            return getattr(bitsandbytes.optim, name)(tensors, **options)

        return make

    bits: Refuses = needs("bitsandbytes", "bitsandbytes")
    entrants = [
        *ours("adamw_step", flat),
        Entrant("torch foreach", lambda: library(lambda tensors: torch.optim.AdamW(tensors, foreach=True, **options))),
        Entrant("torch fused", lambda: library(lambda tensors: torch.optim.AdamW(tensors, fused=True, **options))),
        Entrant("bitsandbytes 32 bit", lambda: library(of_bitsandbytes("AdamW")), bits),
        Entrant("bitsandbytes 8 bit", lambda: library(of_bitsandbytes("AdamW8bit")), bits),
    ]
    words = f"{size:,} entries in {len(segments)} matrices"
    work = (adamw_step.FLOPS_PER_ENTRY * size, 7 * size * 4)
    return Race("adamw_tensors", words, torch.float32, *work, Counter(), truth, entrants, "torch fused", 0.02)
