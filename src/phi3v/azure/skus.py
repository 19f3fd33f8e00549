"""`phi3v azure skus`: the Azure sizes that a recipe fits, and what a quota request for each must say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from phi3v.errors import UserError
from phi3v.plan.hardware import GIB, AzureSku, Gpu, Machine, azure_skus, known_gpus
from phi3v.plan.options import Option
from phi3v.plan.planner import Planner
from phi3v.terminal import say


@dataclass(frozen=True)
class FittedSku:
    """A size with what the planner says of the recipe on it.

    Attributes:
        option: the recipe's method there; None where the machine lacks what the recipe asks for by name.
        reason: why it fits or not.
    """

    sku: AzureSku
    nodes: int
    option: Option | None
    reason: str

    @property
    def fits(self) -> bool:
        """The recipe's method can train there, with the changes that the option names."""
        return self.option is not None and self.option.fits

    @property
    def gpu(self) -> Gpu:
        return known_gpus()[self.sku.gpu]

    @property
    def verdict(self) -> str:
        return self.option.verdict if self.option is not None else "does not fit"

    @property
    def vcpus(self) -> int:
        return self.sku.vcpus * self.nodes

    def to_json_dict(self) -> dict[str, Any]:
        speed = self.option.speed if self.option is not None else None
        return {
            "sku": self.sku.name,
            "gpu": self.gpu.name,
            "gpus": self.sku.gpus * self.nodes,
            "nodes": self.nodes,
            "family": self.sku.family,
            "vcpus_a_node": self.sku.vcpus,
            "vcpus": self.vcpus,
            "fits": self.fits,
            "verdict": self.verdict,
            "engine": self.option.setup.engine if self.option is not None else None,
            "changes": list(self.option.changes) if self.option is not None else [],
            "samples_per_second": round(speed.samples_per_second, 3) if speed is not None else None,
            "reason": self.reason,
            "note": self.sku.note,
        }

    def show(self, console: Console) -> None:
        """Two lines of a size that fits, one of another; names stay whole, to be copied."""
        sku, option = self.sku, self.option
        gpus = f"{sku.gpus * self.nodes}x {self.gpu.name}, {self.gpu.memory_bytes / GIB:.0f} GiB"
        line = Text(f"{sku.name:26} {gpus}: ")
        style = "red" if not self.fits else "yellow" if option is not None and option.changes else "green"
        line.append(self.verdict, style=style)
        note = f" ({sku.note})" if sku.note else ""
        if option is None or not self.fits:
            line.append(f": {self.reason}{note}")
            console.print(line, soft_wrap=True)
            return
        if option.setup.gpus > 1:
            line.append(f" on {option.setup.engine}")
        if option.speed is not None:
            line.append(f", {option.speed.samples_per_second:.2f} samples/s")
        console.print(line, soft_wrap=True)
        quota = f"quota family {sku.family!r}, {sku.vcpus} vCPUs a node, {self.vcpus} in all"
        say(console, f"    {quota}; {self.reason}{note}", style="dim")


def fitted_skus(planner: Planner, *, nodes: int = 1) -> list[FittedSku]:
    """Every size of the table: those that the recipe fits first, each by GPUs and then by their memory."""
    found = [_fit(planner, sku, nodes) for sku in azure_skus().values()]
    return sorted(found, key=lambda f: (not f.fits, f.sku.gpus, f.gpu.memory_bytes, f.sku.vcpus))


def _fit(planner: Planner, sku: AzureSku, nodes: int) -> FittedSku:
    machine = Machine(known_gpus()[sku.gpu], sku.gpus * nodes, nodes, sku)
    try:
        option = planner.plan(machine).best(planner.config.method.name)
    except UserError as error:
        return FittedSku(sku, nodes, None, f"{error.what} ({error.where})")
    return FittedSku(sku, nodes, option, option.reason)


def show_quota_request(console: Console, method: str, found: Sequence[FittedSku]) -> None:
    """The size with the fewest GPUs, and the command that asks for its quota."""
    first = next((entry for entry in found if entry.fits and "retired" not in entry.sku.note), None)
    if first is None:
        text = f"{method} fits none of them on {found[0].nodes} node(s): see `phi3v plan` for what would"
    else:
        text = (
            f"the fewest GPUs: {first.sku.name}; ask for {first.vcpus} vCPUs of {first.sku.family!r} with "
            f"`phi3v azure quota --region REGION --sku {first.sku.name} --request {first.vcpus}`"
        )
    say(console, text, style="bold")
