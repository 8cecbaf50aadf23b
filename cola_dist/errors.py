"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong: bad configuration, data, credentials or checkpoint.

    The message is one line that says what is wrong, where, and what to do. Jobs print it without a stack trace and exit with code 2.
    """
