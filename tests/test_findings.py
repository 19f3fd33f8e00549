"""A report of checks, and the lines that it shows."""

from __future__ import annotations

import io

from rich.console import Console

from phi3v.errors import UserError
from phi3v.findings import Report
from phi3v.terminal import say


def test_a_report_shows_what_it_collects() -> None:
    console = Console(file=io.StringIO(), width=200)
    report = Report(console)
    report.say("disk", "pass", "room for [all] of it")
    assert report.ok
    with report.checking("model"):
        raise UserError("no such folder", where="model.path x", hint="name one")
    assert not report.ok
    assert report.has_failed("disk", "model")
    assert not report.has_failed("disk")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown == "pass disk: room for [all] of it\nfail model: model.path x: no such folder\n     → name one\n"
    assert [finding["check"] for finding in report.to_json_dict()["findings"]] == ["disk", "model"]


def test_a_failure_is_reported_once() -> None:
    report = Report()
    error = UserError("too large", where="training.batch_size")
    assert report.fail("configuration", error)
    assert not report.fail("model", error)
    assert [finding.check for finding in report.findings] == ["configuration"]


def test_text_is_printed_as_it_is() -> None:
    console = Console(file=io.StringIO(), width=20)
    path = "/data/[bold]x[/bold]/" + "long/" * 10
    say(console, path)
    assert console.file.getvalue() == path + "\n"  # type: ignore[attr-defined]
