"""A model in fp64 throughout: the truth that errors are measured against."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """An fp64 copy. Transformers computes RMS norms and rotary angles in fp32 whatever the model's dtype; here the same formulas
    run in fp64: rotations are relative, and only then do left-padded and packed positions give the same attention to 1e-16."""
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(F.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=module.variance_epsilon)
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = partial(rotary_in_double, module)
    return double


def rotary_in_double(rotary: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) [n, t, head_dim] of the rotary position embedding (Su et al. 2021, eq. 34)."""
    angles = (position_ids[..., None].double() * rotary.inv_freq.double()).repeat(1, 1, 2)
    return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
