"""Exceptions of the package."""


class UserError(Exception):
    """A mistake in the settings or inputs, described in one sentence; the command line exits with code 2."""


class AlreadyDone(UserError):
    """The folder already has the complete run; in a sweep it is skipped."""


class NotLeader(Exception):
    """Raised in all but process 0 when a shared run is complete; the result is in process 0."""


class StoppedElsewhere(Exception):
    """Another process of the run was asked to stop, and the state of all is saved."""
