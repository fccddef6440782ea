"""The rack: a partition of its vectors whatever comes and goes, no confused seats, padding that stays zero."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.engine.additions import Additions, LowRank
from server.engine.lens import Lens
from server.engine.rack import Place, Rack, RackFullError, StaleSeatError, demand

DIM, DEPTH = 8, 3


def lens(
    lengths: tuple[int, ...] = (2, 0, 3), tokens: int = 0, classes: int = 4, fill: float = 1.0, ranks: int = 0
) -> Lens:
    keys = tuple(torch.full((length, DIM), fill) for length in lengths)
    rows = LowRank(torch.full((ranks, DIM), fill), torch.full((ranks, DIM), -fill), torch.full((ranks,), 2 * fill))
    return Lens(
        keys,
        tuple(-key for key in keys),
        torch.full((tokens, DIM), fill),
        torch.full((classes, DIM), fill),
        torch.full((classes,), fill),
        (None, Additions(behind=rows), None) if ranks else (),
    )


def seated(rack: Rack, row: Lens) -> Place:
    place = rack.allocate(row)
    rack.write(place, row)
    return place


def test_a_gathered_prefix_is_what_was_written_padded_and_masked() -> None:
    rack = Rack(dim=DIM, slots=4, vectors=200)
    short, long = seated(rack, lens((1, 0, 2), fill=1)), seated(rack, lens((3, 0, 2), fill=2))
    gathered = rack.gather([short, long, short])
    first = gathered.prefix(0)
    assert first is not None
    assert first.mask is not None
    assert first.keys[:, :, 0].tolist() == [[1, 0, 0], [2, 2, 2], [1, 0, 0]]
    assert first.values[:, :, 0].tolist() == [[-1, 0, 0], [-2, -2, -2], [-1, 0, 0]]
    assert first.mask.tolist() == [[True, False, False], [True, True, True], [True, False, False]]
    assert gathered.prefix(1) is None
    last = gathered.prefix(2)
    assert last is not None
    assert last.mask is None, "equal lengths need no mask"


def test_heads_of_ragged_class_counts() -> None:
    rack = Rack(dim=DIM, slots=4, vectors=200)
    places = [seated(rack, lens(classes=classes, fill=fill)) for classes, fill in ((2, 1.0), (5, 2.0))]
    logits = rack.logits(torch.ones(2, DIM), places)
    rows = [row[: rack.classes(place)].tolist() for row, place in zip(logits, places, strict=True)]
    assert rows == [[DIM + 1.0] * 2, [2 * DIM + 2.0] * 5]


def test_a_full_rack_says_what_is_missing_and_takes_nothing() -> None:
    rack = Rack(dim=DIM, slots=2, vectors=20)
    seated(rack, lens())
    assert demand(lens()) == 14
    with pytest.raises(RackFullError, match="1 slot and 14 vectors; free are 1 slots and 6 of 20"):
        rack.allocate(lens())
    rack.check_integrity()
    assert rack.used_slots == 1


def test_a_seat_that_outlived_its_lens_is_noticed() -> None:
    rack = Rack(dim=DIM, slots=1, vectors=50)
    old = seated(rack, lens(fill=1))
    rack.free(old)
    with pytest.raises(StaleSeatError):
        rack.gather([old])
    new = seated(rack, lens(fill=2))
    assert new.slot == old.slot
    assert new.generation > old.generation
    with pytest.raises(StaleSeatError, match="generation"):
        rack.logits(torch.ones(1, DIM), [old])
    with pytest.raises(StaleSeatError):
        rack.free(old)


def test_the_slab_never_moves() -> None:
    rack = Rack(dim=DIM, slots=4, vectors=100)
    address = rack._slab.data_ptr()
    for _ in range(50):
        rack.free(seated(rack, lens()))
    assert rack._slab.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_empty_rack_takes_no_memory(dtype: torch.dtype) -> None:
    """It is zero all the same. A slab of 512 MiB; what else this process does meanwhile is small."""
    dim, size = 1024, 512 * 2**20
    before = resident()
    rack = Rack.sized(dim=dim, slots=4, size_bytes=size, device="cpu", dtype=dtype)
    assert rack.capacity * rack.vector_bytes > 0.99 * size
    assert resident() - before < size / 4
    assert rack._slab.shape == (rack.capacity + 1, dim)
    assert rack._slab.dtype == rack._bias.dtype == dtype
    assert not rack._slab[:: rack.capacity // 7].any()
    rack.check_integrity()


def resident() -> int:
    with Path("/proc/self/statm").open() as pages:
        return int(pages.read().split()[1]) * resource.getpagesize()


class RackMachine(RuleBasedStateMachine):
    """Random coming and going; whoever is seated reads back exactly what it wrote."""

    places = Bundle("places")

    def __init__(self) -> None:
        super().__init__()
        self.rack = Rack(dim=DIM, slots=5, vectors=60)
        self.fill = 0.0
        self.written: dict[Place, tuple[Lens, float]] = {}

    @rule(
        target=places,
        lengths=st.tuples(*[st.integers(0, 4)] * DEPTH),
        tokens=st.integers(0, 3),
        classes=st.integers(1, 9),
        ranks=st.integers(0, 3),
    )
    def come(self, lengths: tuple[int, ...], tokens: int, classes: int, ranks: int) -> Place | None:
        self.fill += 1
        new = lens(lengths, tokens, classes, self.fill, ranks)
        if not self.rack.can_allocate(new):
            with pytest.raises(RackFullError):
                self.rack.allocate(new)
            return None
        place = seated(self.rack, new)
        self.written[place] = (new, self.fill)
        return place

    @rule(place=consumes(places))
    def go(self, place: Place | None) -> None:
        if place is not None:
            self.rack.free(place)
            del self.written[place]

    @invariant()
    def everybody_reads_what_it_wrote(self) -> None:
        self.rack.check_integrity()
        for place, (lens, fill) in self.written.items():
            gathered = self.rack.gather([place])
            for layer, length in enumerate(lens.prefix_lengths):
                prefix = gathered.prefix(layer)
                assert (prefix is None) == (length == 0)
                if prefix is not None:
                    assert torch.equal(prefix.keys[0], lens.keys[layer])
                    assert torch.equal(prefix.values[0], lens.values[layer])
            assert (gathered.tokens is None) == (lens.tokens.shape[0] == 0)
            added = gathered.additions(1)
            assert (added is None) == (not lens.additions)
            if added is not None:
                expected = lens.additions[1]
                for part in ("down", "up", "bias"):
                    assert torch.equal(getattr(added.behind, part)[0], getattr(expected.behind, part))
            (logits,) = self.rack.logits(torch.ones(1, DIM), [place])
            assert logits.tolist() == [fill * DIM + fill] * lens.classes


TestRackMachine = RackMachine.TestCase
TestRackMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
