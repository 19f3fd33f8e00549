"""What an examination finds: lines of pass, warn or fail, each with what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

Verdict = Literal["pass", "warn", "fail"]
_STYLE = {"pass": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

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
    """All findings, in order."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not any(finding.verdict == "fail" for finding in self.findings)

    def to_json_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "findings": [vars(finding) for finding in self.findings]}
