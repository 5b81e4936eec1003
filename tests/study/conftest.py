"""One Ray for all tests of the scheduler: it takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from fastlora.study.schedule import ray_running


@pytest.fixture(scope="session")
def ray() -> Iterator[ModuleType]:
    """Ray on this machine, as the command starts it."""
    with ray_running(None) as running:
        yield running
