"""One fp32 engine of our own for all tests of this folder; they run in one worker (xdist_group), each skipped by name without vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rollout.vllm.engines import KeptEngine, engine_process, write_model


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One engine at a time: all of this folder in one worker, from the start on (slow), and none of it where vLLM is missing."""
    here = Path(__file__).parent
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.xdist_group("vllm"))
            item.add_marker(pytest.mark.slow)
            if missing:
                item.add_marker(pytest.mark.skip(reason="vllm is not installed (make setup-vllm)"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in fp32, as files."""
    return write_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def engine(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeptEngine]:
    """Running."""
    process = engine_process(model_folder, tmp_path_factory.mktemp("engine") / "engine.log")
    shared = KeptEngine(process)
    shared.start()
    yield shared
    process.stop()
