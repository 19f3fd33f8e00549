"""Quota through the real SDK, against a server that answers as the REST reference says."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arm import SUBSCRIPTION, Answer, Arm, StaticCredential, error
from azure.core.exceptions import ClientAuthenticationError
from azure.identity import CredentialUnavailableError

from phi3v.azure import account as account_module
from phi3v.azure import quota
from phi3v.azure.account import Account, sign_in
from phi3v.cli import main
from phi3v.errors import UserError

FAMILY = "Standard NDASv4_A100 Family"
SCOPE = f"/subscriptions/{SUBSCRIPTION}/providers/Microsoft.Compute/locations/westeurope"
QUOTAS, USAGES = f"{SCOPE}/providers/Microsoft.Quota/quotas", f"{SCOPE}/providers/Microsoft.Quota/usages"
SKUS = f"/subscriptions/{SUBSCRIPTION}/providers/Microsoft.Compute/skus"
COMMAND = ["azure", "quota", "--region", "westeurope", "--sku", "Standard_ND96asr_v4"]


def usage(name: str, value: int) -> dict[str, Any]:
    properties = {
        "usages": {"value": value},
        "unit": "Count",
        "name": {"value": name, "localizedValue": f"{name} vCPUs"},
        "isQuotaApplicable": True,
    }
    return {"id": f"{USAGES}/{name}", "name": name, "type": "Microsoft.Quota/Usages", "properties": properties}


def limit(name: str, value: int, *, requestable: bool = True) -> dict[str, Any]:
    properties = {
        "limit": {"limitObjectType": "LimitValue", "limitType": "Independent", "value": value},
        "unit": "Count",
        "name": {"value": name, "localizedValue": f"{name} vCPUs"},
        "resourceType": "dedicated",
        "isQuotaApplicable": requestable,
    }
    return {"id": f"{QUOTAS}/{name}", "name": name, "type": "Microsoft.Quota/Quotas", "properties": properties}


def size(name: str, restrictions: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "resourceType": "virtualMachines",
        "name": name,
        "family": FAMILY,
        "locations": ["westeurope"],
        "restrictions": restrictions,
    }


@pytest.fixture
def westeurope(arm: Arm, account: Account) -> Arm:
    """A region with a limit of 96 vCPUs of the family, none used; the lists have two pages."""
    next_page = {"nextLink": f"{arm.endpoint}{USAGES}/page2?api-version=2025-09-01"}
    arm.on("GET", USAGES, Answer(200, {"value": [usage("standardDSv3Family", 8)]} | next_page))
    arm.on("GET", f"{USAGES}/page2", Answer(200, {"value": [usage(FAMILY, 0)]}))
    arm.on("GET", f"{QUOTAS}/{FAMILY}", Answer(200, limit(FAMILY, 96)))
    arm.on("GET", SKUS, Answer(200, {"value": [size("Standard_ND96asr_v4", [])]}))
    return arm


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = main([*COMMAND, *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_limit_and_usage(westeurope: Arm, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(capsys, "--nodes", "2")
    assert code == 0
    assert "Standard_ND96asr_v4 is offered in westeurope" in shown
    assert f"{FAMILY}, Compute, westeurope: 0 of 96 vCPUs used" in shown
    assert "2 node(s) of Standard_ND96asr_v4 need 192 vCPUs: 96 too few" in shown
    assert "Quotas → Compute → My quotas → westeurope" in shown
    assert f'az quota update --resource-name "{FAMILY}" --scope "{SCOPE}" --limit-object value=192' in shown
    assert all(headers["Authorization"] == "Bearer a-token" for _, _, _, headers in westeurope.asked)


def test_in_json(westeurope: Arm, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(capsys, "--json")
    answer = json.loads(shown)
    assert code == 0
    assert (answer["limit"], answer["used"], answer["needed"], answer["enough"]) == (96, 0, 96, True)


def test_a_family_is_found_however_it_is_spelled(westeurope: Arm, account: Account) -> None:
    assert quota.read_quota(account, "compute", "westeurope", "standardNDASv4_A100Family").family == FAMILY
    with pytest.raises(UserError, match="no quota of the family 'standardNDASv5_A100Family'") as caught:
        quota.read_quota(account, "compute", "westeurope", "standardNDASv5_A100Family")
    assert FAMILY in str(caught.value)


def test_machine_learning_has_its_own(arm: Arm, account: Account, capsys: pytest.CaptureFixture[str]) -> None:
    scope = SCOPE.replace("Microsoft.Compute", "Microsoft.MachineLearningServices")
    arm.on(
        "GET", f"{scope}/providers/Microsoft.Quota/usages", Answer(200, {"value": [usage("standardNDSv2Family", 40)]})
    )
    arm.on("GET", "/quotas/standardNDSv2Family", Answer(200, limit("standardNDSv2Family", 40)))
    command = ["azure", "quota", "--region", "westeurope", "--family", "standardNDSv2Family", "--for", "ml"]
    assert main(command) == 0
    assert "standardNDSv2Family, Machine learning, westeurope: 40 of 40 vCPUs used" in capsys.readouterr().out


def test_a_request_is_sent_and_followed(westeurope: Arm, capsys: pytest.CaptureFixture[str]) -> None:
    """202 with an operation to look at, which takes its time, then the new limit."""
    operation = f"{SCOPE}/providers/Microsoft.Quota/quotaRequests/1"
    accepted = {"Azure-AsyncOperation": f"{westeurope.endpoint}{operation}?api-version=2025-09-01"}
    westeurope.on("PUT", f"{QUOTAS}/{FAMILY}", Answer(202, limit(FAMILY, 192), accepted))
    going = [Answer(200, {"name": "1", "status": state}) for state in ("Accepted", "InProgress", "Succeeded")]
    westeurope.on("GET", operation, *going)
    westeurope.on("GET", f"{QUOTAS}/{FAMILY}", Answer(200, limit(FAMILY, 96)), Answer(200, limit(FAMILY, 192)))
    code, shown, _ = run(capsys, "--request", "192", "--yes")
    assert code == 0
    assert "96 → 192 vCPUs" in shown
    assert "az quota request status list" in shown
    assert "InProgress" in shown
    assert "granted: 192 vCPUs" in shown
    (body,) = [body for method, _, body, _ in westeurope.asked if method == "PUT"]
    assert body["properties"]["limit"] == {"limitObjectType": "LimitValue", "value": 192}
    assert body["properties"]["name"] == {"value": FAMILY}
    assert body["properties"]["resourceType"] == "dedicated"


def test_a_request_by_location_header_and_one_at_once(westeurope: Arm, account: Account) -> None:
    import io

    from rich.console import Console

    now = quota.read_quota(account, "compute", "westeurope", FAMILY)
    location = {"Location": f"{westeurope.endpoint}{QUOTAS}/status/2"}
    westeurope.on("PUT", f"{QUOTAS}/{FAMILY}", Answer(202, None, location))
    westeurope.on("GET", f"{QUOTAS}/status/2", Answer(202, None, location), Answer(200, limit(FAMILY, 288)))
    assert quota.request_quota(account, now, 288, Console(file=io.StringIO())) == 288
    westeurope.on("PUT", f"{QUOTAS}/{FAMILY}", Answer(200, limit(FAMILY, 384)))
    assert quota.request_quota(account, now, 384, Console(file=io.StringIO())) == 384


def test_a_request_that_azure_declines(westeurope: Arm, capsys: pytest.CaptureFixture[str]) -> None:
    operation = f"{SCOPE}/providers/Microsoft.Quota/quotaRequests/1"
    accepted = {"Azure-AsyncOperation": f"{westeurope.endpoint}{operation}"}
    westeurope.on("PUT", f"{QUOTAS}/{FAMILY}", Answer(202, limit(FAMILY, 192), accepted))
    said = {"code": "ContactSupport", "message": "Request failed, please contact support."}
    westeurope.on("GET", operation, Answer(200, {"name": "1", "status": "Failed", "error": said}))
    code, _, errors = run(capsys, "--request", "192", "--yes")
    assert code == 2
    assert "Request failed, please contact support" in errors
    assert "support ticket" in errors


def test_it_asks_first_and_never_without_a_terminal(
    westeurope: Arm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, shown, errors = run(capsys, "--request", "192")
    assert code == 2
    assert "96 → 192 vCPUs" in shown
    assert "there is no terminal to confirm it on" in errors
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda *prompt: "n")
    code, shown, _ = run(capsys, "--request", "192")
    assert code == 0
    assert "not sent" in shown
    assert not [method for method, *_ in westeurope.asked if method == "PUT"]


def test_a_request_that_makes_no_sense(westeurope: Arm, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(capsys, "--request", "96", "--yes")
    assert code == 2
    assert "the limit is 96 vCPUs already" in errors
    westeurope.on("GET", f"{QUOTAS}/{FAMILY}", Answer(200, limit(FAMILY, 0, requestable=False)))
    code, _, errors = run(capsys, "--request", "96", "--yes")
    assert code == 2
    assert "takes no requests" in errors
    assert main(["azure", "quota", "--region", "westeurope"]) == 2
    assert "one of --sku and --family" in capsys.readouterr().err


def test_a_size_that_the_region_or_the_subscription_lacks(
    westeurope: Arm, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = [{"type": "Location", "values": ["westeurope"], "reasonCode": "NotAvailableForSubscription"}]
    westeurope.on("GET", SKUS, Answer(200, {"value": [size("Standard_ND96asr_v4", closed)]}))
    code, shown, _ = run(capsys)
    assert code == 0
    assert "not open to this subscription (NotAvailableForSubscription)" in shown
    westeurope.on("GET", SKUS, Answer(200, {"value": []}))
    assert "does not exist in westeurope" in run(capsys)[1]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error(403, "AuthorizationFailed", "The client has no authorization"), ["no permission", "role 'Reader'"]),
        (error(404, "SubscriptionNotFound", "It could not be found"), ["no such subscription", "az account list"]),
        (error(404, "NotFound", "No such thing"), ["does not find it", "register --namespace Microsoft.Quota"]),
        (error(409, "MissingSubscriptionRegistration", "No"), ["does not use Microsoft.Quota yet", "az provider"]),
        (error(400, "InvalidLocation", "No region"), ["not available in that region", "az account list-locations"]),
        (error(401, "InvalidAuthenticationToken", "The token is old"), ["does not accept this login", "az login"]),
        (error(500, "InternalServerError", "Oh"), ["Azure refuses (500): Oh"]),
    ],
)  # fmt: skip
def test_refusals_in_plain_words(
    westeurope: Arm,
    account: Account,
    answer: Answer,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(account_module, "RETRIES", 0)
    westeurope.on("GET", USAGES, answer)
    code, _, errors = run(capsys)
    assert code == 2
    for word in words:
        assert word in errors


def test_put_off_and_then_answered(westeurope: Arm, account: Account, capsys: pytest.CaptureFixture[str]) -> None:
    """429 with Retry-After is asked again after that time, and given up after some."""
    busy = error(429, "TooManyRequests", "Slow down", **{"Retry-After": "0.01"})
    westeurope.on("GET", USAGES, busy, busy, Answer(200, {"value": [usage(FAMILY, 0)]}))
    assert run(capsys)[0] == 0
    assert sum(path == USAGES for _, path, _, _ in westeurope.asked) == 3
    westeurope.on("GET", USAGES, busy)
    code, _, errors = run(capsys)
    assert code == 2
    assert "put the request off too often (429)" in errors


class NoLogin(StaticCredential):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def get_token(self, *scopes: str, **kwargs: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("kind", [CredentialUnavailableError, ClientAuthenticationError])
def test_no_login(arm: Arm, kind: Callable[..., Exception]) -> None:
    nobody = Account(NoLogin(kind(message="DefaultAzureCredential failed")), SUBSCRIPTION, arm.endpoint)
    with pytest.raises(UserError, match="not signed in to Azure") as caught:
        quota.read_quota(nobody, "compute", "westeurope", FAMILY)
    assert "az login" in str(caught.value)
    assert not arm.asked


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_module, "RETRIES", 0)
    nowhere = Account(StaticCredential(), SUBSCRIPTION, "https://127.0.0.1:9")
    with pytest.raises(UserError, match="Azure cannot be reached"):
        quota.read_quota(nowhere, "compute", "westeurope", FAMILY)


def test_which_subscription(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("AZURE_SUBSCRIPTION_ID", raising=False)
    with pytest.raises(UserError, match="no Azure subscription is chosen"):
        sign_in(None)
    profile = {"subscriptions": [{"id": "a", "isDefault": False}, {"id": "b", "isDefault": True}]}
    (tmp_path / "azureProfile.json").write_text(json.dumps(profile), encoding="utf-8-sig")
    assert sign_in(None).subscription == "b"
    monkeypatch.setenv("AZURE_SUBSCRIPTION_ID", "c")
    assert sign_in(None).subscription == "c"
    assert sign_in("d").subscription == "d"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = account_module.importlib.util.find_spec
    absent = lambda name, *rest: None if name.startswith("azure.mgmt") else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(account_module.importlib.util, "find_spec", absent)
    code, _, errors = run(capsys)
    assert code == 2
    assert "needs azure.mgmt.quota, and it is not installed" in errors
    assert 'pip install "phi3v[azure]"' in errors
