"""What the tests of Azure's part share: a local Azure Resource Manager and a login to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from arm import SUBSCRIPTION, Arm, StaticCredential, certificate, serve

from phi3v.azure import account as account_module
from phi3v.azure import quota
from phi3v.azure.account import Account


@pytest.fixture(scope="session")
def certificate_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def arm(certificate_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Arm]:
    """A server that the SDK trusts, and that commands find where Azure would be."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate_files[0]))
    with serve(*certificate_files) as server:
        yield server


@pytest.fixture
def account(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> Account:
    account = Account(StaticCredential(), SUBSCRIPTION, arm.endpoint)
    monkeypatch.setattr(account_module, "sign_in", lambda subscription: account)
    monkeypatch.setattr(quota, "POLL_SECONDS", 0.05)
    return account
