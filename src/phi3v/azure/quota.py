"""`phi3v azure quota`: limit and usage of a size's family in a region, and a request for more.

Azure's quota service (https://learn.microsoft.com/rest/api/quota) holds the limits of Compute, which virtual machines
count against, and of Machine Learning, which its clusters and serverless jobs count against: two limits of one family.
"""

from __future__ import annotations

import difflib
import re
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from phi3v.azure.account import Account, explained, require_extra, sign_in
from phi3v.errors import UserError
from phi3v.plan.hardware import AzureSku, find_machine

Service = Literal["compute", "ml"]
PROVIDERS: dict[Service, str] = {"compute": "Microsoft.Compute", "ml": "Microsoft.MachineLearningServices"}
NAMES: dict[Service, str] = {"compute": "Compute", "ml": "Machine learning"}
PORTAL = "https://portal.azure.com/#view/Microsoft_Azure_Capacity/QuotaMenuBlade/~/myQuotas"
POLL_SECONDS = 15.0  # between looks at a request, where Azure names no time
READ_ROLE, REQUEST_ROLE = "Reader", "Quota Request Operator"


@dataclass(frozen=True)
class FamilyQuota:
    """What a subscription may use of a family of sizes in a region.

    Attributes:
        family: as the service spells it, which differs in capitals and spaces from place to place.
        limit, used: vCPUs.
        requestable: Azure takes requests for it here; without that only a support ticket helps.
        resource_type: what a request must repeat, such as ``dedicated``.
    """

    service: Service
    region: str
    family: str
    limit: int
    used: int
    requestable: bool = True
    resource_type: str | None = None


def scope_of(account: Account, service: Service, region: str) -> str:
    """The resource whose quota is meant."""
    return f"subscriptions/{account.subscription}/providers/{PROVIDERS[service]}/locations/{region}"


def read_quota(account: Account, service: Service, region: str, family: str) -> FamilyQuota:
    """Limit and usage of a family.

    Raises:
        UserError: Azure refuses, or the region has no such family; names the nearest ones.
    """
    from azure.mgmt.quota import QuotaMgmtClient

    client, scope = account.client(QuotaMgmtClient), scope_of(account, service, region)
    with _explained(service, region, role=READ_ROLE):
        usages = {str(entry.name): entry for entry in client.usages.list(scope)}
    found = {_plain(name): name for name in usages}.get(_plain(family))
    if found is None:
        near = difflib.get_close_matches(_plain(family), [_plain(name) for name in usages], n=3, cutoff=0.7)
        names = [name for name in usages if _plain(name) in near]
        raise UserError(
            f"{NAMES[service]} has no quota of the family {family!r} in {region}",
            where="--region",
            hint=f"near are {', '.join(names)}; give one with --family" if names else "try another region",
        )
    with _explained(service, region, role=READ_ROLE):
        limit = client.quota.get(found, scope)
    usage = usages[found].properties
    return FamilyQuota(
        service=service,
        region=region,
        family=found,
        limit=int(limit.properties.limit["value"]),
        used=int(usage.usages.value) if usage and usage.usages else 0,
        requestable=limit.properties.is_quota_applicable is not False,
        resource_type=limit.properties.resource_type,
    )


def _plain(family: str) -> str:
    """A family's name without what services spell differently."""
    return re.sub(r"[\s_-]", "", family).lower()


def request_quota(account: Account, quota: FamilyQuota, limit: int, console: Console) -> int:
    """Ask for ``limit`` vCPUs and follow the request to its end; returns the new limit.

    Raises:
        UserError: Azure refuses.
    """
    from azure.mgmt.quota import QuotaMgmtClient
    from azure.mgmt.quota.models import CurrentQuotaLimitBase, LimitObject, QuotaProperties, ResourceName

    client, scope = account.client(QuotaMgmtClient), scope_of(account, quota.service, quota.region)
    wanted = QuotaProperties(
        limit=LimitObject(value=limit), name=ResourceName(value=quota.family), resource_type=quota.resource_type
    )
    with _explained(quota.service, quota.region, role=REQUEST_ROLE):
        body = CurrentQuotaLimitBase(properties=wanted)
        poller = client.quota.begin_create_or_update(quota.family, scope, body, polling_interval=POLL_SECONDS)
        _say(console, f"sent; its state: `{status_command(account, quota)}`")
        begin, said = time.monotonic(), ""
        while not poller.done():
            if poller.status() != said:
                said = poller.status()
                _say(console, f"  {time.monotonic() - begin:4.0f} s  {said}")
            poller.wait(POLL_SECONDS)
        granted = poller.result()
    return int(granted.properties.limit["value"]) if granted.properties and granted.properties.limit else limit


def _explained(service: Service, region: str, *, role: str) -> Any:
    return explained(
        f"{NAMES[service]} quota in {region}",
        role=role,
        missing=f"is {region} a region (`az account list-locations --output table`) with quota of {NAMES[service]}",
        provider="Microsoft.Quota",
    )


def offered_in(account: Account, sku: AzureSku, region: str) -> tuple[bool, str]:
    """Whether a region has a size for this subscription, whatever the quota, and the sentence that says so."""
    from azure.mgmt.compute import ComputeManagementClient

    client = account.client(ComputeManagementClient)
    with explained(
        f"sizes in {region}", role=READ_ROLE, missing=f"is {region} a region", provider=PROVIDERS["compute"]
    ):
        entries = client.resource_skus.list(filter=f"location eq '{region}'")
        found = next((entry for entry in entries if (entry.name or "").lower() == sku.name.lower()), None)
    if found is None:
        return False, f"{sku.name} does not exist in {region}"
    closed = [limit for limit in found.restrictions or [] if str(limit.type).lower().endswith("location")]
    if closed:
        reason = getattr(closed[0].reason_code, "value", closed[0].reason_code)
        return False, f"{sku.name} is in {region}, but not open to this subscription ({reason})"
    return True, f"{sku.name} is offered in {region}"


def view_command(account: Account, quota: FamilyQuota) -> str:
    """The ``az`` command that shows the limit."""
    scope = f"/{scope_of(account, quota.service, quota.region)}"
    return f'az quota show --resource-name "{quota.family}" --scope "{scope}"'


def request_command(account: Account, quota: FamilyQuota, limit: int) -> str:
    """The ``az`` command that sends the same request."""
    scope = f"/{scope_of(account, quota.service, quota.region)}"
    kind = f" --resource-type {quota.resource_type}" if quota.resource_type else ""
    return (
        f'az quota update --resource-name "{quota.family}" --scope "{scope}" '
        f"--limit-object value={limit} limit-object-type=LimitValue{kind}"
    )


def status_command(account: Account, quota: FamilyQuota) -> str:
    """The ``az`` command that lists requests."""
    return f'az quota request status list --scope "/{scope_of(account, quota.service, quota.region)}"'


def quota_command(
    console: Console,
    *,
    region: str,
    sku: str | None = None,
    family: str | None = None,
    service: Service = "compute",
    nodes: int = 1,
    request: int | None = None,
    yes: bool = False,
    subscription: str | None = None,
) -> dict[str, Any]:
    """Show a family's quota, request more if asked to, and return what ``--json`` prints.

    Args:
        sku, family: an Azure size, or a family by its name.
        nodes: of that size, to say whether the limit is enough.
        request: the new limit in vCPUs.
        yes: send it without asking.

    Raises:
        UserError: the size is unknown, Azure refuses, or there is nobody to ask.
    """
    if (sku is None) == (family is None):
        raise UserError("one of --sku and --family is needed", where="--sku", hint="e.g. --sku Standard_ND96asr_v4")
    size = find_machine(None, None, sku).sku if sku is not None else None
    require_extra("azure.mgmt.quota", "azure.mgmt.compute")
    account = sign_in(subscription)
    answer: dict[str, Any] = {"service": service, "region": region}
    if size is not None:
        answer["offered"], sentence = offered_in(account, size, region)
        _say(console, sentence, style="" if answer["offered"] else "yellow")
    quota = read_quota(account, service, region, size.family if size is not None else str(family))
    _say(console, f"{quota.family}, {NAMES[service]}, {region}: {quota.used} of {quota.limit} vCPUs used")
    answer |= {"family": quota.family, "limit": quota.limit, "used": quota.used, "requestable": quota.requestable}
    if size is not None:
        needed, free = size.vcpus * nodes, quota.limit - quota.used
        answer |= {"needed": needed, "enough": free >= needed}
        enough = "enough" if free >= needed else f"{needed - free} too few"
        _say(console, f"{nodes} node(s) of {size.name} need {needed} vCPUs: {enough}")
    wanted = request if request is not None else quota.used + (size.vcpus * nodes if size is not None else 0)
    portal = f"Quotas → {NAMES[service]} → My quotas → {region} → {quota.family} → New Quota Request"
    command = request_command(account, quota, wanted)
    answer |= {"portal": f"{PORTAL} ({portal})", "az": [view_command(account, quota), command]}
    _say(console, f"portal: {portal}\n        {PORTAL}")
    _say(console, f"az (extension quota): {view_command(account, quota)}\n                      {command}")
    if request is not None:
        answer["requested"] = request
        answer["granted"] = _request(account, quota, request, console, yes=yes)
    return answer


def _request(account: Account, quota: FamilyQuota, limit: int, console: Console, *, yes: bool) -> int | None:
    """Show the change, ask, send it. Returns the limit that was granted, None if the person said no."""
    if not quota.requestable:
        raise UserError(
            f"Azure takes no requests for {quota.family!r} in {quota.region}",
            where="--request",
            hint=f"open a support ticket in the portal, or try another region: {PORTAL}",
        )
    if limit <= quota.limit:
        raise UserError(f"the limit is {quota.limit} vCPUs already", where="--request", hint="ask for more, or not")
    _say(console, f"request: {quota.family} in {quota.region}, {quota.limit} → {limit} vCPUs", style="bold")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("nobody is there to say yes", where="--request", hint="add --yes to send it unasked")
        if console.input("send it? [y/N] ").strip().lower() not in ("y", "yes"):
            _say(console, "not sent")
            return None
    granted = request_quota(account, quota, limit, console)
    _say(console, f"granted: {granted} vCPUs", style="bold")
    return granted


def _say(console: Console, text: str, *, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)
