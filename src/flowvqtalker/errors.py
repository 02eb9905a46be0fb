"""Errors meant for the person at the keyboard."""

from __future__ import annotations

__all__ = ["MissingDependency", "UserError"]


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what was given, what is allowed and what to do next. The command
    line prints it without a traceback and exits with code 2.

    Attributes:
        code: short stable name of the problem for programs, for instance ``no_face``.
    """

    def __init__(self, message: str, *, code: str = "invalid") -> None:
        super().__init__(message)
        self.code = code


class MissingDependency(UserError):
    """An optional package or a file that a package would bring is not installed."""
