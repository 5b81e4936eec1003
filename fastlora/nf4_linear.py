"""Frozen projections in 4 bits, so that a base model of 8 billion parameters takes 5 GB (fastlora/nf4.py has the format)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlora.allocator import release_freed_memory
from fastlora.nf4 import QuantizationError, quantize
from fastlora.ops.lora_linear import lora_linear


class Nf4Linear(nn.Linear):
    """y = x Wᵀ + b with W packed. `weight` is uint8 [n, d / 2], `absmax` float32 [n d / 64], both frozen; the bias stays dense.

    Not bitsandbytes' Linear4bit: on a CPU that one repacks its weight for good at the first call in eval mode, and its backward pass keeps
    the unpacked weight of every layer. Here W is unpacked for a product and thrown away, in both passes.
    """

    absmax: nn.Parameter

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        packed, absmax = quantize(dense.weight.data)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [*, d] -> y [*, n]: a group of one module of rank 0."""
        a_rd, b_flat = x.new_empty(0, self.in_features), x.new_empty(0)
        return lora_linear(x, [self.weight], [self.bias], a_rd, b_flat, [0], [0.0], None, [self.absmax])[0]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Path -> linear layer of the decoder, dense or packed; the output head is left out."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name: module for name, module in model.named_modules() if type(module) in (nn.Linear, Nf4Linear) and module is not head}


@torch.no_grad()
def quantize_projections(model: nn.Module) -> None:
    """Packs every linear layer of the decoder, one after another; embedding and output head stay as they are.

    Raises QuantizationError, which names the layer that cannot be packed.
    """
    dense = list(linear_layers(model).items())
    while dense:  # nobody else holds them: a dense weight is freed before the next one is packed
        name, layer = dense.pop(0)
        try:
            model.set_submodule(name, Nf4Linear(layer))
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error
    release_freed_memory()  # the dense weights
