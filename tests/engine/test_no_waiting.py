"""On CUDA the host waits for nothing but the answers: the serving forward on a device that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from server.engine import transfer
from server.engine.batch import Pixels, Work
from server.engine.block import FrozenBlock
from server.engine.lens import Lens
from server.engine.transfer import Block, PinnedTransfer
from server.methods.registry import METHODS
from tests.engine.fake_cuda import FakeEvent, WaitsError, Watch, fake_cuda, on_fake_cuda
from tests.engine.golden_cases import Bench, golden_backbone
from tests.engine.test_isolation import TASKS, picture


@pytest.fixture(scope="module")
def lenses() -> list[Lens]:
    """Made on the CPU, where they have numbers."""
    backbone = golden_backbone("vit_nano", 101, torch.float64)
    lowered = [task.lens(backbone) for task in TASKS]
    assert sum(bool(lens.parts) for lens in lowered) > 10  # worked out here, and kept
    return lowered


class There:
    """An engine on the device that is not there, and a row of every task."""

    def __init__(self, lenses: list[Lens]) -> None:
        self.bench = Bench(on_fake_cuda(golden_backbone("vit_nano", 101, torch.float64)))
        seats = [self.bench.seat(lens) for lens in lenses]
        pictures: list[Pixels] = [*(picture(n) for n in range(3)), np.zeros((3, 64, 64), np.float32)]
        self.work: list[Work] = [(pictures[n % len(pictures)], seat) for n, seat in enumerate(seats)]
        self.engine = self.bench.engine


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, lenses: list[Lens]) -> Iterator[There]:
    with fake_cuda(monkeypatch):
        yield There(lenses)


def test_a_row_of_every_method_is_here() -> None:
    assert {task.method for task in TASKS} >= {method.name for method in METHODS}


def test_nothing_waits_before_the_answers(there: There) -> None:
    watch = Watch()
    for _ in range(2):  # the second batch in blocks that the first one left
        with watch:
            begun = there.engine.begin(there.work)
        answers = begun()
        assert [len(row) for row in answers] == [len(seat.labels) for _, seat in there.work]
    assert watch.back == 2, "one copy back for all rows of a batch"
    assert watch.there > 0


def test_embedding_waits_for_nothing_either(there: There) -> None:
    watch = Watch()
    with watch:
        there.engine.embed([picture(n) for n in range(3)])
    assert (watch.there, watch.back) == (2, 1)


def test_a_second_batch_can_be_begun_while_the_first_computes(there: There) -> None:
    """In pinned memory of its own: what the first is still reading is not written."""
    first, second = there.engine.begin(there.work), there.engine.begin(there.work[:3])
    assert len(second()) == 3
    assert len(first()) == len(there.work)
    first_free, second_free = there.engine._transfers._free
    assert first_free._blocks[0] is not second_free._blocks[0]


WAYS_TO_WAIT: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "branching": lambda x: 1 if x.any() else 0,
    "nonzero": lambda x: x.nonzero(),
    "mask as an index": lambda x: x[x > 0],
    "from the host": lambda x: x + torch.ones(x.shape[-1]).to(x.device),
    "from the host, unpinned": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "list as an index": lambda x: x[[0, 0]],
    "array as an index": lambda x: x[np.array([0, 0])],
    "to the host": lambda x: x.cpu(),
}


@pytest.mark.parametrize("way", WAYS_TO_WAIT)
def test_whatever_would_wait_is_noticed(there: There, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    behind = FrozenBlock.after_mlp

    def waiting(block: FrozenBlock, x: Tensor) -> Tensor:
        WAYS_TO_WAIT[way](x)
        return behind(block, x)

    monkeypatch.setattr(FrozenBlock, "after_mlp", waiting)
    with Watch(), pytest.raises((WaitsError, DataDependentOutputException, DynamicOutputShapeException)):
        there.engine.begin(there.work[:1])


def test_pinned_memory_is_taken_once(there: There) -> None:
    there.engine.begin(there.work)()
    [pinned_transfer] = there.engine._transfers._free
    blocks = list(pinned_transfer._blocks)
    for size in (1, 2, len(there.work)):
        there.engine.begin(there.work[:size])()
        assert there.engine._transfers._free == [pinned_transfer]
        assert pinned_transfer._blocks == blocks


# --- pinned blocks themselves, with numbers ---------------------------------------------------------------------------


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Callable[[], PinnedTransfer]:
    """Crossings to the CPU through blocks of ordinary memory, 1,000 bytes the smallest."""
    free: list[PinnedTransfer] = []

    def block(size: int) -> Block:
        tensor = torch.empty(size, dtype=torch.uint8)
        return Block(tensor.numpy(), tensor)

    monkeypatch.setattr(transfer, "StreamEvent", FakeEvent)
    monkeypatch.setattr(Block, "of", block)
    monkeypatch.setattr(transfer, "SMALLEST", 1000)
    return lambda: free.pop() if free else PinnedTransfer(torch.device("cpu"), free.append)


ARRAYS = st.lists(
    arrays(st.sampled_from([np.int64, np.float32, np.uint8, np.bool_]), array_shapes(max_dims=3, max_side=9)),
    max_size=12,
)


@given(batches=st.lists(ARRAYS, max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_sent_arrives(pinned: Callable[[], PinnedTransfer], batches: list[list[np.ndarray]]) -> None:
    """Arrays of a batch lie side by side, in one block or in several, and each comes out as it went in."""
    for batch in batches:
        way = pinned()
        sent = [way.send(array) for array in batch]  # on this device views of the block: they show what overlaps
        wait = way.start_fetch(torch.arange(7).to(torch.bfloat16))
        for array, tensor in zip(batch, sent, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), array)
        assert wait().tolist() == list(range(7))


def test_stacks_are_filled_from_the_front(pinned: Callable[[], PinnedTransfer]) -> None:
    way, target = pinned(), torch.full((4, 2), 9)
    way.fill(target, [np.array([1, 2]), np.array([3, 4])])
    assert target.tolist() == [[1, 2], [3, 4], [9, 9], [9, 9]]
    assert way.stack([np.array([1]), np.array([2])]).tolist() == [[1], [2]]


def test_the_blocks_of_a_large_batch_become_one(pinned: Callable[[], PinnedTransfer]) -> None:
    for expected in (3, 1, 1):
        way = pinned()
        for _ in range(3):
            way.send(np.zeros(900, np.uint8))
        assert len(way._blocks) == expected
        way.start_fetch(torch.zeros(1))()
