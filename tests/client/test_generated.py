"""The synchronous client is what its generator makes of the asynchronous one."""

from __future__ import annotations

import pytest

import generate_sync


def test_the_synchronous_client_is_up_to_date() -> None:
    assert generate_sync.TARGET.read_text(encoding="utf-8") == generate_sync.generate(), "run `make sync-client`"


def test_a_replacement_that_no_longer_applies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_sync, "REPLACEMENTS", (("no such text", ""),))
    with pytest.raises(SystemExit, match="expected 'no such text' at least once"):
        generate_sync.generate()
