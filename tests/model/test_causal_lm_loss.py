"""The loss against torch's cross-entropy over full logits, and what weights and normaliser mean.

Tolerance 1e-6 throughout: losses are float32 of about 3 (resolution 2.4e-7), summed in another order.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from phi3v.model import loss as loss_module
from phi3v.model.loss import causal_lm_loss
from phi3v.processing.conversation import IGNORE_INDEX

ROWS, LENGTH, HIDDEN, VOCABULARY = 3, 17, 8, 29


@pytest.fixture
def hidden_states() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, LENGTH, HIDDEN, generator=generator).requires_grad_()


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(HIDDEN, VOCABULARY, bias=False)


@pytest.fixture
def labels() -> torch.Tensor:
    """Rows with 5, 11 and 1 labels."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    for row, count in enumerate((5, 11, 1)):
        labels[row, : LENGTH - count] = IGNORE_INDEX
    return labels


def plain(hidden_states: torch.Tensor, head: nn.Linear, labels: torch.Tensor) -> torch.Tensor:
    """Losses (B, T - 1) over full logits, 0 where nothing is learnt."""
    logits = head(hidden_states)[:, :-1].float()
    targets = labels[:, 1:]
    losses = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view(targets.shape)


def test_is_the_mean_over_tokens(hidden_states: torch.Tensor, head: nn.Linear, labels: torch.Tensor) -> None:
    loss = causal_lm_loss(hidden_states, head, labels)
    logits = head(hidden_states)[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    gradients = torch.autograd.grad(loss, [hidden_states, head.weight])
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, [hidden_states, head.weight]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_weights_and_normalizer(hidden_states: torch.Tensor, head: nn.Linear, labels: torch.Tensor) -> None:
    weights = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(3))
    losses = plain(hidden_states, head, labels)
    weighted = (losses * weights[:, 1:]).sum()
    learnt = labels[:, 1:] != IGNORE_INDEX
    for normalizer, divisor in ((None, weights[:, 1:][learnt].sum()), (7.5, 7.5), (torch.tensor(3.0), 3.0)):
        loss = causal_lm_loss(hidden_states, head, labels, weights, normalizer)
        torch.testing.assert_close(loss, weighted / divisor, atol=1e-6, rtol=0)


def test_weights_of_tokens_that_are_not_learnt_do_not_count(
    hidden_states: torch.Tensor, head: nn.Linear, labels: torch.Tensor
) -> None:
    weights = torch.ones(ROWS, LENGTH)
    weights[labels == IGNORE_INDEX] = 1000.0
    torch.testing.assert_close(
        causal_lm_loss(hidden_states, head, labels, weights), causal_lm_loss(hidden_states, head, labels)
    )


def test_the_first_label_has_nothing_before_it(hidden_states: torch.Tensor, head: nn.Linear) -> None:
    labels = torch.full((ROWS, LENGTH), IGNORE_INDEX)
    labels[:, 0] = 3
    labels[0, 1] = 4
    loss = causal_lm_loss(hidden_states, head, labels)
    expected = functional.cross_entropy(head(hidden_states[:1, 0]), torch.tensor([4]))
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weighting", ["token", "sample"])
@pytest.mark.parametrize("split", [[1, 1, 1], [2, 1], [1, 2]])
def test_any_split_adds_up(weighting: str, split: list[int], labels: torch.Tensor) -> None:
    """Rows of 5, 11 and 1 labels in micro-batches: the same loss and gradients."""
    torch.manual_seed(4)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).double()
    hidden_states = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.float64)
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(1, keepdim=True)
    weights = torch.ones(ROWS, LENGTH) if weighting == "token" else (1.0 / counts.double()).expand(ROWS, LENGTH)
    normalizer = float(counts.sum()) if weighting == "token" else float(ROWS)

    def run(sizes: list[int]) -> tuple[float, torch.Tensor]:
        head.zero_grad()
        total = 0.0
        parts = zip(hidden_states.split(sizes), labels.split(sizes), weights.split(sizes), strict=True)
        for states, wanted, weight in parts:
            loss = causal_lm_loss(states, head, wanted, weight, normalizer)
            loss.backward()
            total += loss.item()
        return total, head.weight.grad.clone()

    whole, gradient = run([ROWS])
    losses = plain(hidden_states, head, labels).detach().double()
    by_hand = losses.sum() / counts.sum() if weighting == "token" else (losses.sum(1) / counts[:, 0]).mean()
    assert whole == pytest.approx(float(by_hand), abs=1e-6)
    part, part_gradient = run(split)
    # Logits are taken in float32 whatever comes in, so its rounding is what remains.
    assert part == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(part_gradient, gradient, atol=1e-6, rtol=0)


def test_batch_without_labels(hidden_states: torch.Tensor, head: nn.Linear) -> None:
    """With the step's normaliser it adds nothing, with a gradient of zero; alone it is a mean of nothing: NaN.

    NaN is torch's own answer too, and a loud one; a silent 0 is what made trainings "end" at once (trouble 18).
    """
    labels = torch.full((ROWS, LENGTH), IGNORE_INDEX)
    loss = causal_lm_loss(hidden_states, head, labels, None, 5.0)
    assert loss.item() == 0.0
    loss.backward()
    assert hidden_states.grad is not None
    assert not hidden_states.grad.any()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    assert causal_lm_loss(hidden_states, head, labels).isnan()


def test_the_head_runs_at_answer_tokens_only(
    hidden_states: torch.Tensor, head: nn.Linear, labels: torch.Tensor
) -> None:
    rows: list[int] = []
    head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    causal_lm_loss(hidden_states, head, labels)
    assert rows == [5 + 11 + 1]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_chunks_change_nothing(
    weighting: str, adapted: bool, labels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of chunks of 3 tokens (of 17) against the plain loss over full logits, 1e-6 relative.

    With an adapter on the head too, where the plain way is PEFT's own forward.
    """
    torch.manual_seed(6)
    head: Any = nn.ModuleDict({"lm_head": nn.Linear(HIDDEN, VOCABULARY, bias=False)})
    if adapted:
        head = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), head)
    head = head["lm_head"]
    hidden_states = torch.randn(ROWS, LENGTH, HIDDEN, requires_grad=True)
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(1, keepdim=True)
    weights = torch.ones(ROWS, LENGTH) if weighting == "token" else (1.0 / counts).expand(ROWS, LENGTH)
    learnt = [hidden_states, *(p for p in head.parameters() if p.requires_grad)]
    assert len(learnt) == (3 if adapted else 2)
    expected = (plain(hidden_states, head, labels) * weights[:, 1:]).sum() / 7.0
    expected_gradients = torch.autograd.grad(expected, learnt)
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 3 * VOCABULARY + 1)
    rows: list[int] = []
    head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    loss = causal_lm_loss(hidden_states, head, labels, weights, 7.0)
    gradients = torch.autograd.grad(loss, learnt)
    assert rows[:6] == [3, 3, 3, 3, 3, 2]
    assert sorted(rows[6:]) == [2, 3, 3, 3, 3, 3]  # and once more in the backward pass
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    for own, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-6 * float(theirs.abs().max()), rtol=0)


class Allocations(TorchDispatchMode):
    """Sees every tensor that an operation makes, in the forward and in the backward pass."""

    def __init__(self, ignore: torch.Size) -> None:
        super().__init__()
        self.ignore = ignore
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape not in (self.ignore, self.ignore[::-1]):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
                    self.peak = max(self.peak, sum(self.live.values()))
        return made


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most bytes that are alive at once, but for the head's own gradient, at 64 answer tokens."""
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 4096)
    peaks = []
    for vocabulary in (256, 1024, 4096):
        head = nn.Linear(HIDDEN, vocabulary, bias=False)
        hidden_states = torch.randn(1, 65, HIDDEN, requires_grad=True)
        labels = torch.randint(0, vocabulary, (1, 65))
        with Allocations(head.weight.shape) as seen:
            causal_lm_loss(hidden_states, head, labels).backward()
        assert head.weight.grad is not None
        peaks.append(seen.peak)
    assert max(peaks) < 1.1 * min(peaks)
    assert max(peaks) < 64 * 4096 * 4  # the full logits of the largest


def test_half_precision_is_summed_in_float32(labels: torch.Tensor) -> None:
    """1e-6: the same bfloat16 logits, softmax and mean in float32."""
    torch.manual_seed(5)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).bfloat16()
    hidden_states = torch.randn(ROWS, LENGTH, HIDDEN).bfloat16()
    loss = causal_lm_loss(hidden_states, head, labels)
    assert loss.dtype == torch.float32
    losses = plain(hidden_states, head, labels)
    torch.testing.assert_close(loss, losses.sum() / (labels[:, 1:] != IGNORE_INDEX).sum(), atol=1e-6, rtol=0)
