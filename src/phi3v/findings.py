"""Results of checks: pass, warn or fail, each with what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from phi3v.errors import UserError

Verdict = Literal["pass", "warn", "fail"]
_STYLE = {"pass": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    verdict: Verdict
    what: str
    hint: str | None = None

    def render(self, console: Console) -> None:
        line = Text(f"{self.verdict:4} ", style=_STYLE[self.verdict])
        line.append(f"{self.check}: {self.what}", style="default")
        console.print(line, soft_wrap=True)
        if self.hint:
            console.print(Text(f"     → {self.hint}"), soft_wrap=True)


@dataclass
class Report:
    """The results of all checks, in order; each is printed on ``console`` as it is added."""

    console: Console | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(finding.verdict == "fail" for finding in self.findings)

    def has_failed(self, *checks: str) -> bool:
        """Whether one of these checks failed."""
        return any(finding.verdict == "fail" and finding.check in checks for finding in self.findings)

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        if self.console is not None:
            finding.render(self.console)

    def say(self, check: str, verdict: Verdict, what: str, hint: str | None = None) -> None:
        self.add(Finding(check, verdict, what, hint))

    def fail(self, check: str, error: UserError) -> bool:
        """Add an error as a failure unless it was added before; returns whether it is new."""
        what = f"{error.where}: {error.what}" if error.where else error.what
        if any(finding.verdict == "fail" and finding.what == what for finding in self.findings):
            return False
        self.say(check, "fail", what, error.hint)
        return True

    @contextlib.contextmanager
    def checking(self, check: str) -> Iterator[None]:
        """Add a `UserError` raised inside as a failure of ``check``."""
        try:
            yield
        except UserError as error:
            self.fail(check, error)

    def to_json_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "findings": [vars(finding) for finding in self.findings]}
