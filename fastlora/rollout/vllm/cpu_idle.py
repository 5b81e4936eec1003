"""vLLM's worker sleeps while it waits for work on a CPU, instead of spinning on a core that the trainer needs.

After every answer vLLM 0.32's worker polls its shared memory for a second before it waits to be notified. On two cores that second is
the first of the trainer's next phase, whose parallel regions each wait for the thread that has no core. What the sleep costs is one
notification (some 50 µs) a decode step. Applied by FastloraWorker on CPU only.
"""

from __future__ import annotations

import time

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition


def record_read(self: SpinCondition) -> None:
    """Notes that a message was read, after which `wait` may spin for `busy_loop_s` seconds: none."""
    self.last_read, self.busy_loop_s = time.monotonic(), 0.0


def install() -> None:
    """Replaces this method of vLLM's class, for all of its instances in this process."""
    SpinCondition.record_read = record_read
