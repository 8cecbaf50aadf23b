"""The errors that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong: bad configuration, data, credentials or checkpoint.

    The message is one line that says what is wrong, where, and what to do. Jobs print it without a stack trace and exit with code 2.
    """


class RunError(RuntimeError):
    """What the user gave is right, and the work broke down all the same: lost workers, a cluster that is gone.

    The message is one line that says what happened, what is kept and what to do. Jobs print it without a stack trace and exit with code 1.
    """
