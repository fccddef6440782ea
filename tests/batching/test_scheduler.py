"""The queueing policy with plain numbers: no loop, no clock of its own, no tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching.row import Row
from server.batching.scheduler import Full, Scheduler


@dataclass
class Reply:
    """The one question the scheduler asks of a reply."""

    gone: bool = False

    def done(self) -> bool:
        return self.gone


def row(task: str, *, tenant: str = "", deadline: float = 100.0, image: object = None) -> Row:
    return Row(task, tenant, seat=task, image=image, deadline=deadline, arrived=0.0, reply=Reply())


def fill(scheduler: Scheduler, *rows: Row) -> list[Row]:
    for each in rows:
        scheduler.offer(each)
    return list(rows)


def drain(scheduler: Scheduler, size: int, now: float = 0.0) -> list[list[Row]]:
    batches = []
    while len(scheduler):
        batches.append(scheduler.take(now, size)[0])
        scheduler.check_integrity()
    return batches


def test_a_flow_is_first_in_first_out():
    scheduler = Scheduler(100)
    rows = fill(scheduler, *(row("a") for _ in range(7)))
    assert [r for batch in drain(scheduler, 3) for r in batch] == rows


def test_a_batch_is_never_larger_than_asked_and_takes_what_is_there():
    scheduler = Scheduler(100)
    fill(scheduler, *(row(task) for task in "aabbcc"))
    assert [len(batch) for batch in drain(scheduler, 4)] == [4, 2]


def test_a_lone_row_beside_a_noisy_task_is_in_the_next_batch():
    scheduler = Scheduler(1000)
    fill(scheduler, *(row("noisy") for _ in range(500)))
    scheduler.take(0.0, 8)
    (lone,) = fill(scheduler, row("quiet"))
    assert lone in scheduler.take(0.0, 8)[0]


def test_ten_to_one_load_is_served_one_to_one_while_both_wait():
    scheduler = Scheduler(1000)
    for _ in range(20):
        fill(scheduler, *(row("noisy") for _ in range(10)), row("quiet"))
    served = [r.task for batch in drain(scheduler, 8)[:5] for r in batch]
    assert served.count("quiet") == served.count("noisy") == 20


def test_tenants_share_as_tasks_do():
    scheduler = Scheduler(1000)
    fill(scheduler, *(row("a", tenant="big") for _ in range(50)), *(row("a", tenant="small") for _ in range(5)))
    served = [r.tenant for r in scheduler.take(0.0, 10)[0]]
    assert served.count("small") == 5


def test_weights_divide_the_service():
    scheduler = Scheduler(1000, weight=lambda flow: 3.0 if flow[1] == "gold" else 1.0)
    fill(scheduler, *(row("gold") for _ in range(100)), *(row("plain") for _ in range(100)))
    served = [r.task for r in scheduler.take(0.0, 40)[0]]
    assert served.count("gold") == 30


def test_sleeping_saves_nothing_up():
    scheduler = Scheduler(1000)
    fill(scheduler, *(row("busy") for _ in range(200)), row("sleeper"))
    scheduler.take(0.0, 100)
    fill(scheduler, *(row("sleeper") for _ in range(100)))
    served = [r.task for r in scheduler.take(0.0, 20)[0]]
    assert 9 <= served.count("sleeper") <= 11


def test_nobody_starves_when_newcomers_keep_arriving():
    scheduler = Scheduler(10_000)
    (patient,) = fill(scheduler, *(row("old") for _ in range(1)))
    for turn in range(50):
        fill(scheduler, *(row(f"new-{turn}-{i}") for i in range(8)))
        if patient in scheduler.take(0.0, 4)[0]:
            assert turn == 0
            return
    pytest.fail("the first row to arrive was never served")


def test_expired_rows_are_handed_back_and_cost_their_flow_nothing():
    scheduler = Scheduler(100)
    late = fill(scheduler, *(row("a", deadline=1.0) for _ in range(5)))
    fresh = fill(scheduler, *(row("a", deadline=9.0) for _ in range(2)), *(row("b", deadline=9.0) for _ in range(2)))
    batch, expired = scheduler.take(1.0, 3)
    assert expired == late
    assert {r.task for r in batch[:2]} == {"a", "b"}
    assert set(map(id, batch)) <= set(map(id, fresh))


def test_departed_rows_are_dropped_before_the_batch_is_made():
    scheduler = Scheduler(100)
    rows = fill(scheduler, *(row("a") for _ in range(4)))
    rows[0].reply.gone = rows[2].reply.gone = True
    batch, expired = scheduler.take(0.0, 10)
    assert (batch, expired) == ([rows[1], rows[3]], [])
    assert scheduler.pop_departed() == [rows[0], rows[2]]
    assert scheduler.pop_departed() == []


def test_a_full_queue_refuses_but_first_lets_the_departed_go():
    scheduler = Scheduler(3)
    rows = fill(scheduler, row("a"), row("a"), row("b"))
    with pytest.raises(Full):
        scheduler.offer(row("c"))
    rows[0].reply.gone = True
    (new,) = fill(scheduler, row("c"))
    scheduler.check_integrity()
    assert set(map(id, scheduler.take(0.0, 10)[0])) == {id(rows[1]), id(rows[2]), id(new)}


def shown_to(*tasks: str) -> list[Row]:
    """Rows of one request that show one image to these tasks."""
    rows = [row(task) for task in tasks]
    for each in rows:
        each.companions = rows
    return rows


def test_rows_of_one_image_stay_together():
    scheduler = Scheduler(100)
    fill(scheduler, *(row(task) for task in "abpqrpqr"))
    assert [r.task for r in scheduler.take(0.0, 2)[0]] == [
        "a",
        "b",
    ]  # their next turn is a row later than p's, q's, r's
    shown = fill(scheduler, *shown_to("c", "a", "b"))
    served = scheduler.take(0.0, 6)[0]
    assert [r.task for r in served[:3]] == ["p", "q", "r"]
    assert served[3:] == shown, "c's turn has come, and a and b come along"


def test_companions_come_no_more_than_a_row_before_their_turn():
    scheduler = Scheduler(100)
    fill(scheduler, *(row(task) for task in "apqpq"))
    assert [r.task for r in scheduler.take(0.0, 1)[0]] == ["a"]
    first, second = shown_to("c", "a"), shown_to("d", "a")
    fill(scheduler, *first, *second)
    served = [r.task for r in scheduler.take(0.0, 6)[0]]
    assert served == ["p", "q", "c", "a", "d", "p"], "the second image's row for a would be two rows early"
    assert [r.task for r in scheduler.take(0.0, 5)[0]] == ["q", "a"]


def test_companions_do_not_overtake_their_own_flow():
    scheduler = Scheduler(100)
    earlier = fill(scheduler, *(row("a") for _ in range(3)))
    shown = [row("b"), row("a")]
    for each in shown:
        each.companions = shown
    fill(scheduler, *shown)
    served = [r for batch in drain(scheduler, 2) for r in batch]
    assert [r for r in served if r.task == "a"] == [*earlier, shown[1]]


def test_clear_gives_everything_back_in_order_of_arrival():
    scheduler = Scheduler(100)
    rows = fill(scheduler, row("a"), row("b"), row("a"))
    assert scheduler.clear() == rows
    assert len(scheduler) == 0


class Model:
    """Per flow a plain list; a batch is right if it is a set of heads and nobody is two turns behind."""

    def __init__(self) -> None:
        self.flows: dict[str, deque[Row]] = {}

    def offer(self, new: Row) -> None:
        self.flows.setdefault(new.task, deque()).append(new)

    def remove_head(self, gone: Row) -> None:
        assert self.flows[gone.task].popleft() is gone


steps = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.sampled_from("abcd"), st.integers(0, 8)),
        st.tuples(st.just("leave"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("take"), st.integers(1, 5), st.just(0)),
        st.tuples(st.just("sweep"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(steps)
def test_against_a_model(script):
    """Whatever happens: no row is lost, doubled, out of order, served late or served to nobody."""
    scheduler, model, offered = Scheduler(12), Model(), []
    for now, (what, value, extra) in enumerate(script):
        if what == "offer":
            new = row(value, deadline=now + extra)
            waiting = sum(not r.departed for flow in model.flows.values() for r in flow)
            try:
                scheduler.offer(new)
            except Full:
                assert waiting >= 12
                continue
            model.offer(new)
            offered.append(new)
        elif what == "leave" and offered:
            offered[value % len(offered)].reply.gone = True
        elif what == "sweep":
            scheduler.sweep()
        elif what == "take":
            batch, expired = scheduler.take(float(now), value)
            assert len(batch) <= value
            assert all(r.deadline > now and not r.departed for r in batch)
            assert all(r.deadline <= now for r in expired)
            settle(model, batch, expired)
        gone = scheduler.pop_departed()
        assert all(r.departed for r in gone)
        forget(model, gone)
        scheduler.check_integrity()
        assert len(scheduler) == sum(map(len, model.flows.values()))


def settle(model: Model, batch: list[Row], expired: list[Row]) -> None:
    """Served and expired rows leave their flow in the order they came, but for departed ones between them."""
    left = {id(r) for r in [*batch, *expired]}
    for task, flow in model.flows.items():
        going = [r for r in flow if id(r) in left]
        assert [r for r in batch if r.task == task] == [r for r in going if r in batch]
        stay = [r for r in flow if id(r) not in left]
        if going:
            ahead = list(flow)[: list(flow).index(going[-1])]
            assert all(id(r) in left or r.departed for r in ahead), "a row was overtaken inside its flow"
        model.flows[task] = deque(stay)


def forget(model: Model, gone: list[Row]) -> None:
    ids = {id(r) for r in gone}
    for task, flow in model.flows.items():
        model.flows[task] = deque(r for r in flow if id(r) not in ids)


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=2), st.integers(1, 9))
def test_backlogged_flows_are_never_more_than_one_row_apart(loads, size):
    """The fairness bound of SFQ with equal weights, counted after every batch while all flows still wait."""
    scheduler = Scheduler(1000)
    for task, rows in loads.items():
        fill(scheduler, *(row(task) for _ in range(rows)))
    served = dict.fromkeys(loads, 0)
    while all(served[task] < loads[task] for task in loads):
        for r in scheduler.take(0.0, size)[0]:
            served[r.task] += 1
        waiting = [served[task] for task in loads if served[task] < loads[task]]
        if waiting:
            assert max(waiting) - min(waiting) <= 1
