"""The one error a user is meant to read."""


class UserError(ValueError):
    """Bad input, said in one sentence: the value, what is allowed, and the fix.

    The command line prints the sentence and exits with code 2; a script can catch it as an
    ordinary ``ValueError``.
    """
