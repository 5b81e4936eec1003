"""The unfused sequences beside which bytes are counted: PEFT's own layers, forward and backward, and a head that stores its logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import peft
import torch
from torch import Tensor, nn

from bench.eager import EagerOps, product
from fastlora_triton import logprob_rows

RANK_STEP = 8
"""Ranks are rounded up to it here: rows of B begin on 16 bytes, as a fast product asks for. PEFT pads nothing."""


class PeftGroup:
    """Projections of one input, each a `torch.nn.Linear` without bias in bfloat16 with a PEFT adapter of its rank; weights not filled in.

    adapter_dtype float32 is PEFT's default and runs under autocast, as in TRL; bfloat16 is its autocast_adapter_dtype=False, without
    autocast: the least that PEFT moves.
    """

    def __init__(self, d: int, outs: Sequence[int], ranks: Sequence[int], adapter_dtype: torch.dtype) -> None:
        with torch.device("meta"):
            group = nn.ModuleDict({f"p{m}": nn.Linear(d, n, bias=False, dtype=torch.bfloat16) for m, n in enumerate(outs)})
        pattern = {f"p{m}": -(-r // RANK_STEP) * RANK_STEP for m, r in enumerate(ranks) if r}
        if pattern:
            config = peft.LoraConfig(r=RANK_STEP, rank_pattern=pattern, target_modules=list(pattern))
            group = peft.inject_adapter_in_model(config, group, low_cpu_mem_usage=True)
        for name, parameter in group.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
        self.modules = group.to_empty(device="cpu")
        self.autocast = adapter_dtype == torch.float32
        self.x_td = torch.empty(0)
        self.ys: list[Tensor] = []

    def forward(self, x_td: Tensor) -> None:
        """x [t, d] through every projection."""
        self.x_td = x_td.detach().requires_grad_()
        with EagerOps(), torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            self.ys = [layer(self.x_td) for layer in self.modules.values()]

    def backward(self) -> None:
        """Gradients of x and of every A and B, from one for each y; adding them to .grad is left out, as it is on our side."""
        trained = [parameter for parameter in self.modules.parameters() if parameter.requires_grad]
        dys = [torch.empty_like(y) for y in self.ys]
        with EagerOps():
            torch.autograd.grad(self.ys, [self.x_td, *trained], dys, retain_graph=True)  # may be called again


class StoredLogits:
    """logits = h Wᵀ in memory [t, V], one pass over them for log-probability and entropy, one for their gradient in place, and its product
    with W: as TRL's Triton kernel for it works (trl/kernels/logprob_entropy.py), in ours for rows."""

    def __init__(self, h_td: Tensor, w_vd: Tensor, target_t: Tensor) -> None:
        self.h_td, self.w_vd, self.target_t = h_td, w_vd, target_t
        self.z_tv = torch.empty(0)

    def forward(self) -> None:
        """To log-probability and entropy."""
        self.z_tv = product(self.h_td, self.w_vd.t())
        self.vectors = logprob_rows.forward(self.z_tv, self.target_t, 0.9, True)

    def backward(self) -> None:
        """To the gradient of h."""
        logp_t, entropy_t, log_z_t = self.vectors
        logprob_rows.backward_(self.z_tv, self.target_t, logp_t, entropy_t, log_z_t, entropy_t, 0.9)
        product(self.z_tv, self.w_vd)
