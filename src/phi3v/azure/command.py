"""``phi3v azure``: sizes that fit a recipe, quota, and jobs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from phi3v.config import RunConfig, add_recipe, load_config
from phi3v.errors import UserError
from phi3v.grammar import Parser
from phi3v.terminal import say

if TYPE_CHECKING:
    from phi3v.azure.account import Account
    from phi3v.azure.quota import FamilyQuota
    from phi3v.plan.hardware import Machine

SUBSCRIPTION: dict[str, Any] = {
    "metavar": "ID",
    "help": "the subscription (default: $AZURE_SUBSCRIPTION_ID, else that of az)",
}


def add_commands(verbs: Parser) -> None:
    group = verbs.add_group("azure", "sizes, quota and jobs")
    command = group.add_command(
        "skus",
        skus,
        "list the Azure sizes that a recipe fits, the fewest GPUs first, with the quota to request; needs no login",
        "phi3v azure skus docvqa_lora",
    )
    add_recipe(command)
    command.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes of each size")

    command = group.add_command(
        "quota",
        quota,
        "show the limit and usage of a family of sizes in a region, and request more",
        "phi3v azure quota --region westeurope --sku Standard_ND96asr_v4 --request 96",
    )
    command.add_argument("--region", required=True, metavar="REGION", help="e.g. westeurope")
    command.add_argument("--sku", metavar="SIZE", help="an Azure size of the family")
    command.add_argument("--family", metavar="NAME", help="the name of the family, instead of --sku")
    command.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes that you want")
    command.add_argument(
        "--for",
        dest="service",
        choices=("compute", "ml"),
        default="compute",
        help="the quota of virtual machines or of Azure Machine Learning",
    )
    command.add_argument("--request", type=int, metavar="N", help="request a limit of N vCPUs, after confirmation")
    command.add_argument("--yes", action="store_true", help="send the request without confirmation")
    command.add_argument("--subscription", **SUBSCRIPTION)

    command = group.add_command(
        "submit",
        submit,
        "train a recipe as an Azure Machine Learning job, on one or several nodes; it resumes after pre-emption",
        "phi3v azure submit docvqa_lora --sku Standard_ND96asr_v4 --workspace W --resource-group G",
    )
    add_recipe(command)
    command.add_argument("--sku", required=True, metavar="SIZE", help="the Azure size of a node")
    command.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes")
    command.add_argument("--workspace", metavar="NAME", help="the workspace of Azure Machine Learning")
    command.add_argument("--resource-group", metavar="NAME", help="the resource group of the workspace")
    command.add_argument(
        "--data",
        metavar="FOLDER_OR_URI",
        help="the folder of the recipe's data files: a local one (it is uploaded), azureml:NAME:VERSION or azureml://… "
        "(default: the folder of data.train)",
    )
    command.add_argument(
        "--model",
        metavar="FOLDER_OR_URI",
        help="the model, likewise (default: model.path of the recipe; a hub id is downloaded by the job)",
    )
    command.add_argument(
        "--name", metavar="NAME", help="name of the run; the same name resumes it (default: the recipe's)"
    )
    command.add_argument("--compute", metavar="CLUSTER", help="an existing cluster (default: serverless compute)")
    command.add_argument(
        "--low-priority", action="store_true", help="cheaper serverless compute that may be pre-empted"
    )
    command.add_argument(
        "--datastore", default="workspaceblobstore", metavar="NAME", help="datastore for the run folder"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="the job's folder (default: azure-jobs/NAME)")
    command.add_argument("--dry-run", action="store_true", help="write the job's folder and check it; needs no login")
    command.add_argument("--subscription", **SUBSCRIPTION)


def skus(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = load_config(arguments.recipe, arguments.overrides)
    from phi3v.azure.skus import fitted_skus, show_quota_request
    from phi3v.plan.planner import Planner

    planner = Planner(config, progress=config.training.progress_bar)
    found = fitted_skus(planner, nodes=arguments.nodes)
    for entry in found:
        entry.show(console)
    show_quota_request(console, config.method.name, found)
    return {
        "method": config.method.name,
        "data": planner.workload.basis,
        "nodes": arguments.nodes,
        "skus": [entry.to_json_dict() for entry in found],
    }


def quota(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    region, service, sku, nodes = arguments.region, arguments.service, arguments.sku, arguments.nodes
    if (sku is None) == (arguments.family is None):
        raise UserError("one of --sku and --family is needed", where="--sku", hint="e.g. --sku Standard_ND96asr_v4")
    from phi3v.azure.account import require_extra, sign_in
    from phi3v.azure.quota import NAMES, PORTAL, offered_in, read_quota
    from phi3v.plan.hardware import find_machine

    size = find_machine(None, None, sku).sku if sku is not None else None
    require_extra("azure.mgmt.quota", "azure.mgmt.compute")
    account = sign_in(arguments.subscription)
    answer: dict[str, Any] = {"service": service, "region": region}
    if size is not None:
        answer["offered"], sentence = offered_in(account, size, region)
        say(console, sentence, style="" if answer["offered"] else "yellow")
    found = read_quota(account, service, region, size.family if size is not None else arguments.family)
    say(console, f"{found.family}, {NAMES[service]}, {region}: {found.used} of {found.limit} vCPUs used")
    answer |= {"family": found.family, "limit": found.limit, "used": found.used, "requestable": found.requestable}
    needed = size.vcpus * nodes if size is not None else 0
    if size is not None:
        free = found.limit - found.used
        answer |= {"needed": needed, "enough": free >= needed}
        enough = "enough" if free >= needed else f"{needed - free} too few"
        say(console, f"{nodes} node(s) of {size.name} need {needed} vCPUs: {enough}")
    wanted = arguments.request if arguments.request is not None else found.used + needed
    portal = f"Quotas → {NAMES[service]} → My quotas → {region} → {found.family} → New Quota Request"
    az = [found.view_command(), found.request_command(wanted)]
    answer |= {"portal": f"{PORTAL} ({portal})", "az": az}
    say(console, f"portal: {portal}\n        {PORTAL}")
    say(console, f"az (extension quota): {az[0]}\n                      {az[1]}")
    if arguments.request is not None:
        answer["requested"] = arguments.request
        answer["granted"] = _request(account, found, arguments.request, console, yes=arguments.yes)
    return answer


def _request(account: Account, quota: FamilyQuota, limit: int, console: Console, *, yes: bool) -> int | None:
    """Show the change, ask, send it. Returns the limit that was granted, None if the answer was no."""
    from phi3v.azure.quota import PORTAL, request_quota

    if not quota.requestable:
        raise UserError(
            f"Azure takes no requests for {quota.family!r} in {quota.region}",
            where="--request",
            hint=f"open a support ticket in the portal, or try another region: {PORTAL}",
        )
    if limit <= quota.limit:
        raise UserError(f"the limit is {quota.limit} vCPUs already", where="--request", hint="ask for more, or not")
    say(console, f"request: {quota.family} in {quota.region}, {quota.limit} → {limit} vCPUs", style="bold")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("there is no terminal to confirm it on", where="--request", hint="add --yes")
        if console.input("send it? [y/N] ").strip().lower() not in ("y", "yes"):
            say(console, "not sent")
            return None
    granted = request_quota(account, quota, limit, console)
    say(console, f"granted: {granted} vCPUs", style="bold")
    return granted


def submit(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    if arguments.recipe is None and arguments.name is None:
        raise UserError("a run without a recipe has no name", where="--name", hint="name it, e.g. --name docvqa")
    config = load_config(arguments.recipe, arguments.overrides)
    from phi3v.azure.account import require_extra, sign_in
    from phi3v.azure.job import JobSettings, send_job, write_job
    from phi3v.plan.hardware import find_machine

    require_extra("azure.ai.ml")
    workspace, group = arguments.workspace, arguments.resource_group
    settings = JobSettings(
        find_machine(None, None, arguments.sku, arguments.nodes),
        arguments.name or arguments.recipe.stem,
        **{key: getattr(arguments, key) for key in ("data", "model", "compute", "low_priority", "datastore")},
    )
    if not arguments.dry_run and (workspace is None or group is None):
        missing = "--workspace" if workspace is None else "--resource-group"
        raise UserError("is needed to send a job", where=missing, hint="or write it only, with --dry-run")
    verdict = _show_verdict(config, settings.machine, console)
    path = write_job(config, settings, arguments.out or Path("azure-jobs") / settings.name)
    say(console, f"job: {path}, accepted by azure-ai-ml's schema")
    say(console, f"checkpoints and results: {settings.run_folder}")
    az = f"az ml job create --file {path} --workspace-name {workspace or 'W'} --resource-group {group or 'G'}"
    say(console, f"the same with az (extension ml): {az}")
    answer: dict[str, Any] = {"job": str(path), "run_folder": settings.run_folder, "az": az, "verdict": verdict}
    if arguments.dry_run:
        return answer | {"sent": False}
    account = sign_in(arguments.subscription)
    sent, page = send_job(account, path, resource_group=group, workspace=workspace)
    say(console, f"sent: {sent}\n{page or ''}", style="bold")
    say(console, f"watch: az ml job stream --name {sent} --workspace-name {workspace} -g {group}")
    return answer | {"sent": True, "name": sent, "studio": page}


def _show_verdict(config: RunConfig, machine: Machine, console: Console) -> str:
    """What the planner says of the recipe as it is; shown, and left to the user.

    Raises:
        UserError: training would not start.
    """
    from phi3v.plan.planner import Planner

    option = Planner(config, progress=False).plan(machine).own
    if option.refusal is not None:
        raise option.refusal
    style = "" if option.fits and not option.changes else "bold yellow"
    say(console, f"{machine.label}: {config.method.name} {option.verdict}: {option.reason}", style=style)
    if machine.quota:
        say(console, f"needs {machine.quota}, of Machine learning")
    return option.verdict
