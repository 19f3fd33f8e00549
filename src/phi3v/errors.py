"""Errors for users: what is wrong, where, and what to do.

The command line prints a `UserError` without a traceback and exits with 2. Any other exception is a fault of ours and
keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong.

    Args:
        what: what is wrong, one sentence without a full stop.
        where: the file, line, key or option.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        self.one_rank = False  # only this rank may have the error, so it must print it itself
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  → {self.hint}" if self.hint else text

    def told(self, *, what: str | None = None, where: str | None = None) -> UserError:
        """The error in other words, or with another place."""
        kind = UnavailableError if isinstance(self, UnavailableError) else UserError
        return kind(what or self.what, where=where or self.where, hint=self.hint)


class UnavailableError(UserError):
    """What records need cannot be had: a server does not answer, or a disk is full.

    No record is to blame, so that none may be left out for it.
    """


class StoppedError(BaseException):
    """A signal ended the run after its state was saved. The command line prints it and exits with 3.

    A BaseException like KeyboardInterrupt, so that no ``except Exception`` catches it.
    """


class LostRankError(Exception):
    """Another process of the run ended or does not respond. The command line prints it and exits with 1."""
