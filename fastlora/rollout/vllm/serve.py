"""The engine's process: vLLM's own server, which dies with the trainer. `python -m fastlora.rollout.vllm.serve FD [vLLM's flags]`.

FD is the read end of a pipe that the trainer holds open. It ends when the trainer does, however that happens (SIGKILL and power cords
run no handler), and then this process takes its whole group with it: server, engine core and worker.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def _die_with(pipe: int) -> None:
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Watches the pipe and serves."""
    threading.Thread(target=_die_with, args=(int(sys.argv.pop(1)),), daemon=True).start()
    from vllm.entrypoints.launchers.api_server.entry import main as serve  # after the watch: this import takes ten seconds

    serve()


if __name__ == "__main__":
    main()
