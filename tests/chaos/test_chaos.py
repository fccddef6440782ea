"""The judge of a chaos run sees what it must, and a short run of each kind has nothing to see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import ledger
from tests.chaos.ledger import SCORE, Ledger, bundle

ROOT = Path(__file__).resolve().parents[2]


def answer(version: str, label: str, score: float = SCORE) -> dict[str, object]:
    return {"version": version, "predictions": [[{"label": label, "score": score}]]}


def test_the_judge_sees_wrong_stale_and_missing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "STALE_S", 5.0)
    judge, (old, new) = Ledger(), (bundle("fish", number, "0" * 64) for number in (1, 2))
    for made in (old, new):
        judge.will_store(made)
        with judge.changing("fish", made.version) as acknowledged:
            acknowledged()
    good = answer(new.version, "fish 2 yes")
    now = judge._tasks["fish"].until[old.version] - 5.0
    judge.check("fish", now, good)
    judge.check("fish", now + 4, answer(old.version, "fish 1 yes"))
    judge.check_absent("fish", now + 4)
    assert judge.faults == []
    for check in (
        lambda: judge.check("fish", now, answer(new.version, "fish 1 yes")),
        lambda: judge.check("fish", now, answer(new.version, "fish 2 yes", SCORE - 0.01)),
        lambda: judge.check("fish", now + 6, answer(old.version, "fish 1 yes")),
        lambda: judge.check_absent("fish", now + 6),
    ):
        before = len(judge.faults)
        check()
        assert len(judge.faults) == before + 1
    with judge.changing("fish", old.version):
        pass  # nobody knows whether it happened
    judge.check("fish", now + 60, answer(old.version, "fish 1 yes"))
    judge.check("fish", now + 60, good)
    assert len(judge.faults) == 4
    assert judge.expected() == {"fish": ({old.version, new.version}, {old.version, new.version})}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", [(), ("--redis",)], ids=["files", "redis"])
def test_a_short_run(mode: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.chaos", "--minutes", "0.7", *mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
