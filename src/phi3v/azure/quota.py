"""`phi3v azure quota`: limit and usage of a size's family in a region, and a request for more.

Azure's quota service (https://learn.microsoft.com/rest/api/quota) holds the limits of Compute, which virtual machines
count against, and of Machine Learning, which its clusters and serverless jobs count against: two limits of one family.
"""

from __future__ import annotations

import difflib
import re
import time
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from phi3v.azure.account import Account, explained
from phi3v.errors import UserError
from phi3v.plan.hardware import AzureSku
from phi3v.terminal import say

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
        scope: the resource whose quota is meant.
        family: as the service spells it, which differs in capitals and spaces from place to place.
        limit, used: vCPUs.
        requestable: Azure takes requests for it here; without that only a support ticket helps.
        resource_type: what a request must repeat, such as ``dedicated``.
    """

    service: Service
    region: str
    scope: str
    family: str
    limit: int
    used: int
    requestable: bool = True
    resource_type: str | None = None

    def view_command(self) -> str:
        """The ``az`` command that shows the limit."""
        return f'az quota show --resource-name "{self.family}" --scope "/{self.scope}"'

    def request_command(self, limit: int) -> str:
        """The ``az`` command that requests a limit."""
        kind = f" --resource-type {self.resource_type}" if self.resource_type else ""
        return (
            f'az quota update --resource-name "{self.family}" --scope "/{self.scope}" '
            f"--limit-object value={limit} limit-object-type=LimitValue{kind}"
        )

    def status_command(self) -> str:
        """The ``az`` command that lists requests."""
        return f'az quota request status list --scope "/{self.scope}"'


def read_quota(account: Account, service: Service, region: str, family: str) -> FamilyQuota:
    """Limit and usage of a family.

    Raises:
        UserError: Azure refuses, or the region has no such family; names the nearest ones.
    """
    from azure.mgmt.quota import QuotaMgmtClient

    client = account.client(QuotaMgmtClient)
    scope = f"subscriptions/{account.subscription}/providers/{PROVIDERS[service]}/locations/{region}"
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
        scope=scope,
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

    client = account.client(QuotaMgmtClient)
    wanted = QuotaProperties(
        limit=LimitObject(value=limit), name=ResourceName(value=quota.family), resource_type=quota.resource_type
    )
    with _explained(quota.service, quota.region, role=REQUEST_ROLE):
        body = CurrentQuotaLimitBase(properties=wanted)
        poller = client.quota.begin_create_or_update(quota.family, quota.scope, body, polling_interval=POLL_SECONDS)
        say(console, f"sent; its state: `{quota.status_command()}`")
        begin, said = time.monotonic(), ""
        while not poller.done():
            if poller.status() != said:
                said = poller.status()
                say(console, f"  {time.monotonic() - begin:4.0f} s  {said}")
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
