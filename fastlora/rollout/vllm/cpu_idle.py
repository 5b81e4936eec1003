"""vLLM's worker sleeps while it waits for work on a CPU, instead of spinning on a core that the trainer needs.

For a second after every message vLLM 0.32's worker looks into its shared memory without a pause; only then it waits to be notified. On two
cores that second is the first of the trainer's next phase, whose parallel regions each wait for the thread that has no core. It sleeps
POLL_SECONDS between two looks here, and so finds a message that much later: 1 % of a decode step of SmolLM2. (Waiting for the
notification at once is no way out: rollouts stood still for five seconds, as if some were lost.) Applied by FastloraWorker on CPU only.
"""

from __future__ import annotations

import time

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

POLL_SECONDS = 5e-4

_original_wait = SpinCondition.wait


def wait(self: SpinCondition, timeout_ms: int | None = None) -> None:
    """Returns after a moment, so that the caller looks again; after a second without a message, when it is notified."""
    if time.monotonic() <= self.last_read + self.busy_loop_s:
        time.sleep(POLL_SECONDS)
    else:
        _original_wait(self, timeout_ms)


def install() -> None:
    """Replaces this method of vLLM's class, for all of its instances in this process."""
    SpinCondition.wait = wait
