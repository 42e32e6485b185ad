"""The failure that a user can mend."""


class UserError(Exception):
    """A mistake in what was asked or given, said in one sentence; the command line exits with code 2."""
