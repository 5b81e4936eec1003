"""The base of every error with a name: what went wrong, where, and what to do, in one message."""

from collections.abc import Collection
from typing import ClassVar


class FastloraError(Exception):
    """Shown to the user as it is, without a traceback."""

    transient: ClassVar[bool] = False
    """The same, tried again, may succeed: a study does so. False = the message names something to mend first."""


class StoppedError(FastloraError):
    """The run ended early, as asked; the message says what is saved and how to go on."""


class StoppedByAlarmError(StoppedError):
    """An alarm whose action is "stop" went off; the run is saved, and resuming it goes on past the alarm."""


def refuse_unknown_options(given: Collection[str], known: Collection[str], of: str, error: type[FastloraError]) -> None:
    """Raises `error` for names of a task's options that it does not know; of: "a probe"."""
    if unknown := sorted(set(given) - set(known)):
        raise error(f"options of {of}: {', '.join(unknown)} is unknown; known are {', '.join(known)}")
