"""What a person gets who tunes nothing: an answer in seconds and the full fit later, or a search and its reasons."""

from __future__ import annotations

from pathlib import Path

import pytest

from lensrack import Client
from server.cli.sample_pictures import draw
from tests.e2e.forked_server import forked

pytestmark = pytest.mark.timeout(240)


def test_quick_answers_before_its_full_fit_and_auto_tells_what_it_tried(tmp_path: Path) -> None:
    draw(tmp_path, per_class=10)
    fruit = tmp_path / "fruit"
    picture = fruit / "test" / "plum" / "000.png"
    with forked(tmp_path / "home", workers="1", worker_nice="0") as server, Client(server.url) as client:
        dataset = client.datasets.upload(fruit / "train").id
        job = client.train("fruit", dataset, recipe={"search": "quick", "epochs": 400, "batch_size": 8})
        early = next(event for event in job.events() if event.type == "published")
        assert early.data["preliminary"] is True
        answer = client.predict("fruit", picture)
        assert answer.version == early.data["version"]
        assert not job.refresh().finished, "the full fit goes on"
        told = client.tasks.version("fruit", answer.version)
        assert (told.method, told.metrics["preliminary"]) == ("linear", True)
        job.cancel()

        found = client.train("weather", dataset, recipe={"search": "auto", "budget": 300, "epochs": 2}).wait(
            timeout=180
        )
        told = client.tasks.version("weather", str(found.version))
        trials = told.metrics["search"]["trials"]
        assert {trial["method"] for trial in trials} == {"linear", "vpt_deep", "vpt_shallow"}
        assert told.method in {trial["method"] for trial in trials}
        assert told.recipe["epochs"] == 2
        assert client.predict("weather", picture).version == found.version
