"""liger without a GPU: reasons by name; where the library is installed, our calls fit the signatures of its functions."""

from __future__ import annotations

import pytest
import torch

from fastlora import liger

CUDA = torch.device("cuda")


def test_without_the_library_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    assert liger.refuses(CUDA) == "liger-kernel is not installed (pip install 'fastlora[gpu]')"


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: object())
    assert liger.refuses(torch.device("cpu")) == "it runs on a GPU, the tensors are on cpu"
    assert "not torch.float64" in (liger.refuses(CUDA, torch.ones(2, dtype=torch.float64)) or "")
    assert liger.refuses(CUDA, torch.ones(2), torch.empty(0)) == "it takes no empty tensors"
    assert liger.refuses(CUDA, torch.ones(2), 1e-5) is None
