"""The login and subscription that Azure is asked with, and its refusals in plain words."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.errors import UserError

PUBLIC_CLOUD = "https://management.azure.com"
RETRIES = 4  # of a request that Azure puts off (429) or that fails on the way; the waits are those it asks for

# Error codes of Azure Resource Manager, by what they mean to the user.
NO_SUBSCRIPTION = {"SubscriptionNotFound", "InvalidSubscriptionId", "ReadOnlyDisabledSubscription"}
NOT_REGISTERED = {"MissingSubscriptionRegistration", "SubscriptionNotRegistered", "ProviderNotRegistered"}
NOT_IN_REGION = {
    "InvalidLocation",
    "LocationNotAvailableForResourceType",
    "NoRegisteredProviderFound",
    "QuotaNotAvailableForResource",
    "ResourceNotAvailableForOffer",
}


@dataclass(frozen=True)
class Account:
    """A login with a subscription.

    Attributes:
        credential: gives tokens (a ``TokenCredential``).
        endpoint: of Azure Resource Manager.
    """

    credential: Any
    subscription: str
    endpoint: str = PUBLIC_CLOUD

    def client(self, kind: type) -> Any:
        """A management client of the SDK for this account."""
        return kind(self.credential, self.subscription, base_url=self.endpoint, retry_total=RETRIES)


def require_extra(*modules: str) -> None:
    """Check that parts of Azure's SDK are there.

    Raises:
        UserError: one is not installed; names the extra.
    """
    for module in modules:
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # not even the package around it
            there = False
        if not there:
            hint = 'pip install "phi3v[azure]"'
            raise UserError(f"this command needs {module}, and it is not installed", hint=hint)


def sign_in(subscription: str | None) -> Account:
    """The login of ``az``, of the environment or of the machine's managed identity, as Azure's SDK finds it.

    Raises:
        UserError: the SDK is missing, or no subscription is named or chosen.
    """
    require_extra("azure.identity", "azure.core")
    from azure.identity import DefaultAzureCredential

    chosen = subscription or os.environ.get("AZURE_SUBSCRIPTION_ID") or _default_subscription()
    if chosen is None:
        raise UserError(
            "no Azure subscription is chosen",
            where="--subscription",
            hint="give its id, or sign in with `az login` and choose one with `az account set --subscription ID`",
        )
    return Account(DefaultAzureCredential(), chosen)


def _default_subscription() -> str | None:
    """What ``az account set`` chose."""
    folder = Path(os.environ.get("AZURE_CONFIG_DIR", Path.home() / ".azure"))
    try:
        profile = json.loads((folder / "azureProfile.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    return next((str(entry["id"]) for entry in profile.get("subscriptions", []) if entry.get("isDefault")), None)


@contextmanager
def explained(where: str, *, role: str, missing: str, provider: str | None = None) -> Iterator[None]:
    """Turn Azure's errors into `UserError`, with what to do.

    Args:
        where: what was asked for.
        role: the role that allows it.
        missing: what to check if Azure does not find it.
        provider: the resource provider that answers, for the advice to register it.
    """
    from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError, ServiceRequestError

    try:
        yield
    except ClientAuthenticationError as error:
        hint = "sign in with `az login`; in a job set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET"
        if error.status_code is None:
            raise UserError("you are not signed in to Azure", where=where, hint=hint) from None
        raise UserError(f"Azure does not accept this login: {_message(error)}", where=where, hint=hint) from None
    except HttpResponseError as error:
        what, advice = _refusal(error, role=role, missing=missing, provider=provider)
        raise UserError(what, where=where, hint=advice) from None
    except ServiceRequestError as error:
        hint = "is there a network, and does a proxy need HTTPS_PROXY?"
        raise UserError(f"Azure cannot be reached: {_first_line(str(error))}", where=where, hint=hint) from None
    except AzureError as error:
        raise UserError(f"Azure's answer cannot be used: {_first_line(str(error))}", where=where) from None


def _refusal(error: Any, *, role: str, missing: str, provider: str | None) -> tuple[str, str | None]:
    """What an HTTP error says and what to do about it."""
    code, status = _code(error), error.status_code
    said = _message(error)
    register = f"az provider register --namespace {provider}" if provider else None
    if status is not None and status < 300:  # it was taken, looked into and declined
        return f"Azure declines the request: {said}", "open a support ticket in the portal, or try another region"
    if code in NO_SUBSCRIPTION:
        return f"there is no such subscription for this login: {said}", "look at `az account list --output table`"
    if code in NOT_REGISTERED:
        return f"the subscription does not use {provider} yet", register
    if code in NOT_IN_REGION:
        return f"not available in that region or for that kind of subscription: {said}", missing
    if status == 403:
        return f"no permission: {said}", f"ask an owner of the subscription for the role {role!r}"
    if status == 404:
        return f"Azure does not find it: {said}", f"{missing}; or `{register}`" if register else missing
    if status == 429:
        return "Azure has put the request off too often (429)", "wait some minutes and ask again"
    return f"Azure refuses{f' ({status})' if status else ''}: {said}", None


def _code(error: Any) -> str | None:
    return getattr(getattr(error, "error", None), "code", None)


def _message(error: Any) -> str:
    inner = getattr(error, "error", None)
    return _first_line(getattr(inner, "message", None) or str(error.message or error))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "it gives no reason"
