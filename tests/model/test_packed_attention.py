"""Attention over packed rows: what is seen, and that every backend computes the same.

Tolerance 2e-6: outputs are float32 means of values near 1, gradients sums of a few dozen such terms; backends take the
sums in another order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from phi3v import machine
from phi3v.errors import UserError
from phi3v.machine import accelerator_of
from phi3v.model.attention import (
    BACKENDS,
    Layout,
    MaskBackend,
    OutputBackend,
    SegmentBackend,
    VarlenBackend,
    position_ids,
    prepare_row,
    uses_long_factors,
    visible,
)
from phi3v.model.loss import find_targets
from phi3v.train.methods.loading import choose_packed_attention, packed_obstacle

TOLERANCE = 2e-6
CPU = torch.device("cpu")
LAYOUTS: list[Layout] = [
    ((3, 2, 2), (0, 2)),
    ((0, 1),),
    ((0, 40), (0, 1), (0, 17)),
    ((50, 1, 1, 9), (0, 30), (7, 20)),
    ((1, 5, 3), (130, 4, 60, 2)),
]


def test_what_is_seen_and_where_it_stands() -> None:
    """The drawing in the module's docstring."""
    drawing = """
        x........
        xx.......
        xxx......
        xxxx.....
        xxxxx....
        xxx..x...
        xxx..xx..
        .......x.
        .......xx
    """
    rows = [[mark == "x" for mark in line.strip()] for line in drawing.split()]
    assert visible(((3, 2, 2), (0, 2))).tolist() == rows
    assert position_ids(((3, 2, 2), (0, 2))).tolist() == [[0, 1, 2, 3, 4, 3, 4, 0, 1]]


def test_the_factors_are_those_of_each_sample() -> None:
    layout = ((6, 4, 3), (8, 3, 5), (0, 10), (0, 11))  # up to 10, 13, 10 and 11 tokens
    expected = [False] * 13 + [True] * 16 + [False] * 10 + [True] * 11
    assert uses_long_factors(layout, 10).tolist() == [expected]
    with pytest.raises(ValueError, match="share a prefix across LongRoPE's switch at 10"):
        uses_long_factors(((6, 4, 5),), 10)


def inputs(layout: Layout, heads: int = 3, size: int = 8, **kwargs: Any) -> list[torch.Tensor]:
    """Query, key and value (1, heads, T, size)."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, heads, sum(map(sum, layout)), size)
    return [tensor.to(**kwargs).requires_grad_() for tensor in torch.randn(shape, generator=generator)]


def output_and_gradients(backend: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    output = backend(*tensors, 0.3, 0.0)
    assert output.shape == (1, tensors[0].shape[2], tensors[0].shape[1], tensors[0].shape[3])
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


def plain_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **kwargs: Any
) -> torch.Tensor:
    """What a variable-length kernel computes, piece by piece: causal, the last query at the last key."""
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    outputs = []
    for piece in range(len(cu_q) - 1):
        own = [t[cu[piece] : cu[piece + 1]].transpose(0, 1) for t, cu in ((q, cu_q), (k, cu_k), (v, cu_k))]
        queries, keys = own[0].shape[1], own[1].shape[1]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        outputs.append(functional.scaled_dot_product_attention(*own, attn_mask=mask, scale=kwargs["scale"]))
    return torch.cat([output.transpose(0, 1) for output in outputs])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_segments_and_varlen_compute_what_the_mask_does(layout: Layout) -> None:
    tensors = inputs(layout)
    expected = output_and_gradients(MaskBackend(layout, CPU), tensors)
    for backend in (SegmentBackend(layout, CPU), VarlenBackend(layout, CPU, plain_varlen)):
        for got, wanted in zip(output_and_gradients(backend, tensors), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_queries_alone_have_what_they_have_among_all(layout: Layout) -> None:
    """Every third place and the last: of some groups of the layouts no query is asked."""
    tensors = inputs(layout)
    tokens = sum(map(sum, layout))
    asked = torch.arange(tokens)[2::3].tolist()
    outputs = torch.tensor(sorted({*asked, tokens - 1}))
    assert torch.equal(visible(layout, outputs), visible(layout)[outputs])
    backend, whole = OutputBackend(layout, outputs.tolist(), CPU), MaskBackend(layout, CPU)

    def those_of_all(*arguments: Any) -> torch.Tensor:
        return torch.zeros(1, tokens, 3, 8).index_copy(1, outputs, whole(*arguments)[:, outputs])

    expected = output_and_gradients(those_of_all, tensors)
    for got, wanted in zip(output_and_gradients(backend, tensors), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_last_layer_computes_what_is_learnt_from(load_golden: Any, sample: Any) -> None:
    """The loss and the gradients are those of a row whose every output is computed."""
    text = sample("text")
    labels = text.input_ids.clone()
    labels[:, : text.length // 2] = -100
    labels[:, -2] = -100
    layout = ((0, text.length),)
    found = []
    seen: list[int] = []
    for backend in ("packed_mask", "packed_segments"):
        model = load_golden(attn_implementation=backend)
        model.model.layers[-1].mlp.register_forward_hook(lambda _module, given, _out: seen.append(given[0].shape[1]))
        loss = model(
            input_ids=text.input_ids,
            labels=labels,
            layout=layout,
            logits_to_keep=None,
            target_positions=find_targets(labels).tolist(),
        ).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert seen == [text.length, int((labels[:, 1:] != -100).sum())]
    torch.testing.assert_close(found[1], found[0], atol=TOLERANCE, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_computes_what_the_mask_does() -> None:
    """Forward only: on the CPU it has no backward."""
    layout = LAYOUTS[3]
    tensors = [tensor.detach() for tensor in inputs(layout)]
    got = BACKENDS["packed_flex"](layout, CPU)(*tensors, 0.3, 0.0)
    torch.testing.assert_close(got, MaskBackend(layout, CPU)(*tensors, 0.3, 0.0), atol=TOLERANCE, rtol=TOLERANCE)


def test_fewer_key_heads_than_query_heads() -> None:
    layout = LAYOUTS[3]
    query, key, value = inputs(layout, heads=4)
    tensors = [query, *(tensor[:, :2].detach().requires_grad_() for tensor in (key, value))]
    expected = output_and_gradients(MaskBackend(layout, CPU), tensors)
    for got, wanted in zip(output_and_gradients(SegmentBackend(layout, CPU), tensors), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["packed_segments", "packed_flex", "packed_varlen", "packed_fa2"])
def test_backends_agree_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Head size 96. Against float32: 2 % of the largest entry, for the rounding of half values (bf16: 2**-8)."""
    device = torch.device("cuda")
    if obstacle := packed_obstacle(name, accelerator_of(device), dtype):
        pytest.skip(obstacle)
    for layout in LAYOUTS:
        half = inputs(layout, size=96, device=device, dtype=dtype)
        full = [tensor.detach().float().requires_grad_() for tensor in half]
        expected = output_and_gradients(MaskBackend(layout, device), full)
        for got, wanted in zip(output_and_gradients(BACKENDS[name](layout, device), half), expected, strict=True):
            assert (got.float() - wanted).abs().max() <= 0.02 * wanted.abs().max().clamp(min=1.0)


def test_a_packed_model_takes_ordinary_rows(load_golden: Any, sample: Any) -> None:
    """As generation does; and a packed row of two samples gives the logits of each."""
    plain, packed = load_golden(), load_golden(attn_implementation="packed_segments")
    one, text = sample("model", "one_image"), sample("text")
    with torch.no_grad():
        expected = [plain(**given.inputs()).logits[0] for given in (one, text)]
        torch.testing.assert_close(packed(**one.inputs()).logits[0], expected[0], atol=0, rtol=0)
        row = packed(
            input_ids=torch.cat([one.input_ids, text.input_ids], dim=1),
            pixel_values=one.pixel_values,
            image_sizes=one.image_sizes,
            layout=((0, one.length), (0, text.length)),
        ).logits[0]
    for got, wanted in zip(row.split([one.length, text.length]), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)  # as padded batches: other shapes of products


def test_rows_that_cannot_be(load_golden: Any, sample: Any) -> None:
    text = sample("text")
    with pytest.raises(ValueError, match="'sdpa' attention cannot take packed rows"):
        load_golden(attn_implementation="sdpa")(input_ids=text.input_ids, layout=((0, text.length),))
    model = load_golden(attn_implementation="packed_segments", sliding_window=20)
    with pytest.raises(ValueError, match="36 tokens came with"):
        model(input_ids=text.input_ids, layout=((0, text.length - 1),))
    with pytest.raises(ValueError, match="37 tokens is longer than the window of 20"):
        model(input_ids=text.input_ids, layout=((0, text.length),))


def test_boundaries_are_made_once_a_step(load_golden: Any, sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Layout] = []

    def backend(layout: Layout, device: torch.device) -> SegmentBackend:
        made.append(layout)
        return SegmentBackend(layout, device)

    monkeypatch.setitem(BACKENDS, "packed_segments", backend)
    text = sample("text")
    load_golden(attn_implementation="packed_segments")(input_ids=text.input_ids, layout=((0, text.length),))
    assert made == [((0, text.length),)]


@pytest.mark.parametrize("shares", [False, True])
def test_the_choice_on_a_cpu_says_why(shares: bool) -> None:
    name, reason = choose_packed_attention("auto", machine.CPU, torch.float32, shares_prefixes=shares)
    assert name == "packed_segments"
    assert "need" in reason
    assert "cpu" in reason
    assert choose_packed_attention("eager", machine.CPU, torch.float32, shares_prefixes=shares) == (
        "packed_mask",
        "as configured",
    )
    for wanted in ("flex", "varlen", "flash_attention_2"):
        with pytest.raises(UserError, match=f"{wanted} cannot run"):
            choose_packed_attention(wanted, machine.CPU, torch.float32, shares_prefixes=shares)  # type: ignore[arg-type]


def test_a_row_is_prepared_on_its_device() -> None:
    row = prepare_row(((3, 2), (0, 4)), "packed_segments", CPU, 4)
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert row.is_long.tolist() == [[True] * 5 + [False] * 4]
