"""The base of every error with a name: what went wrong, where, and what to do, in one message."""


class FastloraError(Exception):
    """Shown to the user as it is, without a traceback."""
