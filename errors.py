"""The one exception whose text is meant for the user."""


class UserError(ValueError):
    """A mistake that the user can fix. Its text is one sentence: what is wrong, where, and what to
    do about it. Programs print it and exit with code 2."""
