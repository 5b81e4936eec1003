"""The base of every error with a name: what went wrong, where, and what to do, in one message."""

from typing import ClassVar


class FastloraError(Exception):
    """Shown to the user as it is, without a traceback."""

    transient: ClassVar[bool] = False
    """The same, tried again, may succeed: a study does so. False = the message names something to mend first."""


class StoppedError(FastloraError):
    """The run ended early, as asked; the message says what is saved and how to go on."""


class StoppedByAlarmError(StoppedError):
    """An alarm whose action is "stop" went off; the run is saved, and resuming it goes on past the alarm."""
