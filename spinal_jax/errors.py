"""The failure that a user can mend, and the one that is none."""


class UserError(Exception):
    """A mistake in what was asked or given, said in one sentence; the command line exits with code 2."""


class AlreadyDone(UserError):
    """The folder holds the complete run that was asked for; in a sweep nothing is left to do."""


class NotLeader(Exception):
    """What was asked for is with the first of the processes that share a run; for this one nothing is left to do."""


class StoppedElsewhere(Exception):
    """Another of the processes that share a run was asked to stop, and what all of them have is saved."""
