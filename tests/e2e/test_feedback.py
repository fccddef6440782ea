"""What people say about a task's pictures reaches the version that is fitted next."""

from __future__ import annotations

from pathlib import Path

import pytest

from lensrack import Client
from server.cli.sample_pictures import draw
from tests.e2e.forked_server import forked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_what_people_say_reaches_the_next_version(tmp_path: Path) -> None:
    draw(tmp_path / "pictures")
    fruit = tmp_path / "pictures" / "fruit"
    lemons, plums = (sorted((fruit / "test" / label).iterdir()) for label in ("lemon", "plum"))
    with forked(tmp_path / "home", workers="1", worker_nice="0") as server, Client(server.url) as client:
        first = client.datasets.upload(fruit / "train")
        before = client.train("fruit", first.id, method="linear", recipe={"seed": 1}).wait(timeout=120)
        for picture in (*lemons, *plums):
            client.feedback("fruit", picture, picture.parent.name)
        client.feedback("fruit", [*plums[:2]], "damson", new_label=True)
        page = client.tasks.feedback("fruit")
        assert page.labels == {"lemon": len(lemons), "plum": len(plums) - 2, "damson": 2}
        second = client.tasks.freeze_feedback("fruit", name="corrected")
        assert (second.parent, second.images) == (first.id, first.images + page.images)
        after = client.train("fruit", second.id, method="linear", recipe={"seed": 1}).wait(timeout=120)
        assert after.version != before.version
        told = client.tasks.version("fruit", str(after.version))
        assert (told.dataset, told.labels) == (second.id, second.labels)
        assert "damson" in told.labels
        assert client.predict("fruit", lemons[0]).version == after.version
