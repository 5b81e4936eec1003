"""The merged copy: what a sampler's projections become when the adapter is added into them.

    W'_m = W_m + s_m B_m A_m          [n, d], float32; rounded once, by whoever writes it, to the sampler's dtype

Every copy starts from the frozen W of the trainer, never from an earlier copy: adding and subtracting in place rounds twice and drifts.
With B = 0 the copy is W, bit for bit, whatever was merged before.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastlora.lora.groups import AttachError
from fastlora.lora.packed import PackedAdapter
from fastlora.nf4_linear import Nf4Linear


@torch.no_grad()
def merged_weights(adapter: PackedAdapter) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, W' [n, d]) of the groups that have an adapter: a copy in float32, or W itself where the rank is 0.

    Members of rank 0 come too: vLLM keeps q, k, v (and gate, up) as one matrix and loads it whole. Inside `adapter.disabled()` every W
    comes as it is, which takes a merged adapter out again. Raises AttachError for 4-bit weights.
    """
    for group in adapter.groups:
        for name, layer in zip(group.names, group.layers, strict=True):
            if isinstance(layer, Nf4Linear):
                raise AttachError(f"{name} has 4-bit weights, which the adapter was trained beside; a merged copy would be another model")
            weight_nd = layer.weight.detach()
            if group.enabled and name in adapter.slots:
                b_nr, scale = adapter.b_rn(name).t(), adapter.slots[name].scale
                weight_nd = torch.addmm(weight_nd.float(), b_nr, adapter.a_rd(name), alpha=scale)
            yield f"{name}.weight", weight_nd
