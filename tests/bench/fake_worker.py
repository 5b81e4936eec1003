"""Speaks bench.worker's protocol without any library: each run is noted in FOLDER/log and takes micro_batch "seconds"."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.contender import Commands, Contender, Report
from bench.worker import serve


def loop(contender: Contender, folder: Path, commands: Commands, report: Report) -> None:
    """A contender of micro-batch 13 dies at its second command."""
    for number, command in enumerate(commands):
        if contender.micro_batch == 13 and number == 1:
            sys.exit("this contender has had bad luck")
        with (folder / "log").open("a") as log:
            log.write(f"{contender.library} {command.do} {command.path}\n")
        report(contender.micro_batch + number, 2.0 * contender.micro_batch)


if __name__ == "__main__":
    serve(Contender(**json.loads(sys.argv[1])), Path(sys.argv[2]), loop, sys.stdin, sys.stdout)
