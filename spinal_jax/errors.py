"""The two kinds of failure a user meets: a mistake that can be mended, and a result that cannot be trusted."""


class UserError(Exception):
    """A mistake in what the user asked or gave, said in one sentence; the command line exits with code 2."""


class AuditWarning(UserWarning):
    """A measurement that was made but should be read with care, for example too few rows for the model's width."""
