"""Ways to attend: all of them are softmax(q·kᵀ/√d + mask)·v, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from server.engine import attention
from server.engine.attention import Attend, by_products, fused, head_by_head
from server.engine.packed import can_pack

CPU = torch.device("cpu")
needs_float32 = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="PyTorch packs no float32 weights here")
WAYS = {
    "fused": (fused, torch.float32, 2e-6),
    "by products": (by_products, torch.float32, 2e-6),
    "by products, bfloat16": (by_products, torch.bfloat16, 3e-2),
    "head by head": pytest.param((head_by_head, torch.float32, 2e-6), marks=needs_float32),
}
Way = tuple[Attend, torch.dtype, float]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(rows: int, queries: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Heads [rows, 3, ·, 16], as they come: views into what a product of all heads gave."""
    generator = torch.Generator().manual_seed(queries + keys)
    parts = (torch.randn(rows, tokens, 48, generator=generator).to(dtype) for tokens in (queries, keys, keys))
    query, keys_, values = (part.unflatten(-1, (3, 16)).transpose(1, 2) for part in parts)
    return query, keys_, values


def a_mask(rows: int, keys: int) -> Tensor:
    seen = torch.linspace(1, keys, rows).long()
    return (torch.arange(keys) < seen[:, None])[:, None, None]


def literal(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("bhqd,bhnd->bhqn", query.double(), keys.double()) / query.shape[-1] ** 0.5
    shares = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)
    return torch.einsum("bhqn,bhnd->bqhd", shares, values.double()).flatten(2)


@pytest.mark.parametrize("masked", [False, True], ids=["all seen", "masked"])
@pytest.mark.parametrize(("rows", "queries", "keys"), [(1, 197, 207), (3, 128, 128), (2, 130, 1), (4, 1, 60)])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_all_are_the_literal_attention(way: Way, rows: int, queries: int, keys: int, masked: bool) -> None:
    attention, dtype, close = way
    inputs = drawn(rows, queries, keys, dtype)
    mask = a_mask(rows, keys) if masked else None
    torch.testing.assert_close(attention(*inputs, mask).double(), literal(*inputs, mask), atol=close, rtol=close)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_the_mask_hides_changes_no_bit(way: Way) -> None:
    attention, dtype, _ = way
    query, keys, values = (part.contiguous() for part in drawn(3, 140, 9, dtype))  # as they lie when filled
    mask = a_mask(3, 9)
    hidden = ~mask.transpose(2, 3)
    quiet = attention(query, keys, values, mask)
    loud = attention(query, keys.masked_fill(hidden, 1e4), values.masked_fill(hidden, 1e4), mask)
    assert torch.equal(loud, quiet)


@needs_float32
def test_head_by_head_a_row_has_the_same_bits_in_any_company() -> None:
    query, keys, values = drawn(5, 150, 170)
    together = head_by_head(query, keys, values, None)
    for row in range(5):
        alone = slice(row, row + 1)
        assert torch.equal(head_by_head(query[alone], keys[alone], values[alone], None), together[alone])


@needs_float32
def test_head_by_head_is_for_many_queries_one_thread_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        calls.append(query.shape[2])
        return fused(query, keys, values, mask)

    monkeypatch.setattr(attention, "fused", counted)
    query, keys, values = drawn(2, attention.MANY, 20)
    head_by_head(query, keys, values, None)
    assert calls == []
    head_by_head(query[:, :, 1:], keys, values, None)
    assert calls == [attention.MANY - 1]
    torch.set_num_threads(2)
    head_by_head(query, keys, values, None)
    torch.set_num_threads(1)
    assert len(calls) == 2
    result = keys.detach().clone().requires_grad_()
    head_by_head(query, result, values, None).square().sum().backward()
    assert len(calls) == 3
    true = keys.double().requires_grad_()
    literal(query, true, values, None).square().sum().backward()
    assert true.grad is not None
    assert result.grad is not None
    torch.testing.assert_close(result.grad.double(), true.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("capability", "expected"), [("AVX512", head_by_head), ("AVX2", fused), ("DEFAULT", fused)])
def test_heads_go_apart_where_mkl_is_the_slower_one(
    capability: str, expected: Attend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert attention.fastest(True, torch.float32) is expected
    assert attention.fastest(True, torch.bfloat16) is by_products
    assert attention.fastest(False, torch.float32) is fused
