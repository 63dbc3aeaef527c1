"""The one error a user is meant to read."""


class UserError(ValueError):
    """Bad input, said in one sentence: the value, what is allowed, and the fix.

    The command line prints the sentence and exits with code 2; a script can catch it as an
    ordinary ``ValueError``.

    >>> rq.Patching(alpha=2)
    Traceback (most recent call last):
    rq4lens.errors.UserError: Patching: alpha = '2' is not allowed ...
    """

    def __str__(self) -> str:
        """The sentence without characters that would act on a terminal."""
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in super().__str__())
