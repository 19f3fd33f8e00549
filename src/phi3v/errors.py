"""The error that a user meets: what is wrong, where, what to do.

The command line prints it without a traceback and exits with code 2. Anything else that escapes is a
fault of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong.

    Args:
        what: what is wrong, one sentence without a full stop.
        where: the file, line, key or flag it was found at.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        self.one_rank = False  # of several processes only this one may have met it, so it must speak for itself
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  → {self.hint}" if self.hint else text


class StoppedError(BaseException):
    """A signal ended the run; what there was to save has been saved. The command line prints it and exits with 3.

    As KeyboardInterrupt it comes out of any code, so no handler of ordinary errors may take it for one.
    """


class LostRankError(Exception):
    """Another process of the run ended, or does not answer. The command line prints it and exits with 1."""
