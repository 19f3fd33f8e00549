"""The optimizers: their arithmetic, their rounding, and what does not go together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Train, load, read_metrics

from phi3v.config import DataConfig, MethodConfig, RunConfig, TrainingConfig, load_config
from phi3v.train.checks import Case, refusals
from phi3v.train.device import RuntimeDevice
from phi3v.train.methods.optimizers import (
    StochasticAdamW,
    make_optimizer,
    round_stochastically,
    state_bytes,
)

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounding_is_unbiased() -> None:
    """The mean of 4,000 roundings of each of 256 values is the value.

    A bfloat16 has 8 bits, so neighbours are up to 2**-7 of a value apart and one rounding has a standard deviation of
    at most half of that; the mean of 4,000 has 6.2e-5. 5 of these for the worst of 256 values is 3.1e-4, against
    3.9e-3 that rounding to nearest may miss by. Seeded.
    """
    values = torch.randn(256, generator=generator())
    source = generator(1)
    rounded = torch.stack([round_stochastically(values, source) for _ in range(4000)])
    assert rounded.dtype == torch.bfloat16
    assert len(rounded[:, 0].unique()) == 2  # its two neighbours and nothing else
    errors = ((rounded.double().mean(0) - values.double()) / values.double()).abs()
    assert errors.max() < 3.1e-4
    assert ((values.bfloat16().double() - values.double()) / values.double()).abs().max() > 3e-3


def test_rounding_keeps_what_is_exact() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0e38, float("inf"), float("-inf"), float("nan")])
    for seed in range(20):
        torch.testing.assert_close(
            round_stochastically(values, generator(seed))[[0, 1, 2, 3, 5, 6, 7]].float(),
            values[[0, 1, 2, 3, 5, 6, 7]],
            equal_nan=True,
            atol=0,
            rtol=0,
        )


def steps(optimizer_class: Any, weights: list[torch.Tensor], count: int = 20, **settings: Any) -> list[torch.Tensor]:
    """The weights after ``count`` steps on a fixed sequence of gradients."""
    source = generator(5)
    optimizer = optimizer_class(weights, **SETTINGS, **settings)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=source).to(weight.dtype)
        optimizer.step()
    return [weight.detach().float() for weight in weights]


def test_arithmetic_is_that_of_adamw() -> None:
    """Small float32 tensors have float32 moments and no rounding: torch's own numbers, 1e-6 (an order of products)."""

    def weights() -> list[torch.Tensor]:
        return [torch.nn.Parameter(torch.randn(5, 7, generator=generator(2)))]

    (own,), (expected,) = steps(StochasticAdamW, weights(), moments="8bit"), steps(torch.optim.AdamW, weights())
    torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_rounded_moments_and_weights_stay_near(moments: Any) -> None:
    """20 steps of 0.01 move a weight by up to 0.2; the rounded run ends within a fifth of that of torch's on average.

    Moments of 8 bits differ by 1 % to 5 % from exact ones, weights in bfloat16 by 0.4 % each step.
    """
    start = torch.randn(3, 5000, generator=generator(2))
    (own,) = steps(StochasticAdamW, [torch.nn.Parameter(start.bfloat16())], moments=moments)
    (expected,) = steps(torch.optim.AdamW, [torch.nn.Parameter(start.clone())])
    moved = (expected - start).abs().mean()
    assert (own - expected).abs().mean() < 0.2 * moved
    assert (own - expected).mean().abs() < 0.02 * moved  # no drift to one side


def test_small_updates_add_up() -> None:
    """An update of 1e-4 of a weight, 200 times: rounding to nearest would never move it."""
    weight = torch.nn.Parameter(torch.ones(4000).bfloat16())
    optimizer = StochasticAdamW([weight], lr=1e-4, betas=(0.0, 0.0), eps=1e-12, weight_decay=0.0)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # 0.98; a weight's spread is at most sqrt(200) * 0.002 = 0.03, of the mean of 4,000 5e-4.
    assert float(weight.detach().float().mean()) == pytest.approx(0.98, abs=2.5e-3)


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_a_saved_state_goes_on_to_the_bit(moments: Any) -> None:
    """And the noise depends on seed, step and tensor alone."""

    def make(value: torch.Tensor) -> tuple[torch.nn.Parameter, StochasticAdamW]:
        weight = torch.nn.Parameter(value.clone())
        return weight, StochasticAdamW([weight], **SETTINGS, moments=moments, seed=3)

    def step(weight: torch.nn.Parameter, optimizer: StochasticAdamW, number: int) -> None:
        weight.grad = torch.randn(weight.shape, generator=generator(number)).bfloat16()
        optimizer.step()

    start = torch.randn(2, 3000, generator=generator(9)).bfloat16()
    weight, optimizer = make(start)
    for number in range(4):
        step(weight, optimizer, number)
        if number == 1:
            other, resumed = make(weight.detach())
            resumed.load_state_dict(optimizer.state_dict())
            torch.randn(100)  # the global generator plays no part
    for number in (2, 3):
        step(other, resumed, number)
    assert torch.equal(other, weight)
    for key, value in optimizer.state[weight].items():
        assert torch.equal(torch.as_tensor(resumed.state[other][key]), torch.as_tensor(value)), key


def test_a_large_tensor_is_updated_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same 8-bit numbers, since slices end where blocks do."""
    from phi3v.train.methods import optimizers

    def run() -> torch.Tensor:
        return steps(StochasticAdamW, [torch.nn.Parameter(torch.ones(5000))], count=3, moments="8bit")[0]

    whole = run()
    monkeypatch.setattr(optimizers, "SLICE", 1024)
    assert torch.equal(run(), whole)


def test_stepping_in_the_backward_pass_is_stepping_after_it(small_model_dir: Path) -> None:
    """To the bit, on the real model in float32; and no gradient is left over."""
    ids = torch.arange(3, 40)[None]

    def train(in_backward: bool) -> dict[str, torch.Tensor]:
        model = load(small_model_dir, MethodConfig("full"))
        optimizer = StochasticAdamW([p for p in model.parameters() if p.requires_grad], **SETTINGS, moments="8bit")
        if in_backward:
            optimizer.step_in_backward()
        for _ in range(2):
            model(input_ids=ids, labels=ids, logits_to_keep=None).loss.backward()
            assert all(p.grad is None for p in model.parameters()) == in_backward
            optimizer.step()
            optimizer.zero_grad()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    after, before = train(False), train(True)
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert not torch.equal(after["lm_head.weight"], load(small_model_dir, MethodConfig("full")).lm_head.weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"training.optimizer": "adamw_8bit"},
        {"training.optimizer": "adamw_bf16", "training.precision": "bf16"},
        {
            "training.optimizer": "adamw_8bit",
            "training.precision": "bf16",
            "training.lean": "true",
            "training.max_grad_norm": 0,
        },
    ],
    ids=["8bit", "bf16", "lean"],
)
def test_runs_and_learns(train: Train, settings: dict[str, Any]) -> None:
    """Through the real command line: the loss falls, and what is saved is what was trained."""
    arguments = [part for pair in settings.items() for part in pair]
    # Few samples, since CPUs without bf16 instructions are slow at it.
    code, folder = train(
        *arguments,
        *("data.eval", "null", "training.batch_size", 1, "training.micro_batch_size", 1, "training.max_steps", 4),
    )
    assert code == 0
    losses = [line["loss"] for line in read_metrics(folder)]
    assert losses[-1] < losses[0]
    assert (folder / "final" / "manifest.json").is_file()


RUNTIME = RuntimeDevice(torch.device("cpu"), "bf16", "", 0, 1)
LEAN: dict[str, Any] = {"lean": True, "optimizer": "adamw_8bit", "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    ("settings", "runtime", "message"),
    [
        ({"optimizer": "adamw_bf16"}, {"precision": "fp16"}, "the precision is fp16"),
        (LEAN, {"precision": "fp32"}, "the precision is fp32"),
        (LEAN | {"optimizer": "adamw"}, {}, "lean mode holds no float32 weights"),
        (LEAN | {"max_grad_norm": 1.0}, {}, "cannot be clipped"),
        (LEAN | {"batch_size": 16}, {}, "4 micro-batches cannot be accumulated"),
        (LEAN, {"world_size": 2}, "before the ranks could add theirs"),
        (LEAN | {"activation_checkpointing": "none"}, {}, "recomputes all activations"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], runtime: dict[str, Any], message: str) -> None:
    config = RunConfig(training=TrainingConfig(**{"batch_size": 4, "micro_batch_size": 4} | settings))
    found = refusals(Case(config, dataclasses.replace(RUNTIME, **runtime)))
    assert any(message in str(refusal) for refusal in found)


def test_lean_mode_takes_no_packed_rows() -> None:
    config = RunConfig(data=DataConfig(packing="samples"), training=TrainingConfig(**LEAN))
    (refusal,) = refusals(Case(config, RUNTIME))
    assert "a step of packed rows may have several" in str(refusal)


def test_bytes_of_a_parameter() -> None:
    """Gradient and moments; the weight itself is in memory before."""
    assert state_bytes(TrainingConfig()) == 12
    assert state_bytes(TrainingConfig(optimizer="adamw_8bit")) == 6
    assert state_bytes(TrainingConfig(optimizer="adamw_bf16")) == 6
    assert state_bytes(TrainingConfig(**LEAN)) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_parts_have_learning_rates_of_their_own(train: Train, optimizer: str) -> None:
    code, folder = train(
        *("training.optimizer", optimizer, "training.learning_rate", 1e-3, "training.schedule", "constant_with_warmup"),
        *("training.learning_rates.vision", 1e-5, "training.learning_rates.projector", 1e-4, "training.max_steps", 2),
    )
    assert code == 0
    line = read_metrics(folder)[-1]
    rates = [line[f"learning_rate_{part}"] for part in ("decoder", "projector", "vision")]
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5])


def test_groups_keep_their_weight_decay(small_model_dir: Path) -> None:
    config = load_config(
        None,
        [
            "--training.learning_rates.vision",
            "1e-5",
            "--training.learning_rate",
            "1e-3",
            "--training.weight_decay",
            "0.1",
        ],
    )
    model = load(small_model_dir, config.method)
    decayed = [p for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1]
    others = [p for name, p in model.named_parameters() if p.requires_grad and p.dim() <= 1]
    optimizer = make_optimizer(model, config, fused=True)
    found = {(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    rates = {"vision": 1e-5, "projector": 1e-3, "decoder": 1e-3}
    assert found == {(part, rate, decay) for part, rate in rates.items() for decay in (0.1, 0.0)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decayed) + len(others)
    vision = dict(model.named_parameters())["model.vision_embed_tokens.img_processor.vision_model.pre_layrnorm.weight"]
    before = vision.detach().clone()
    vision.grad = torch.ones_like(vision)
    optimizer.step()
    assert float((before - vision.detach()).max()) == pytest.approx(1e-5, rel=0.1)
