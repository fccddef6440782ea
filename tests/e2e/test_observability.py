"""A real server with its worker, asked and trained; then what alerts and dashboards ask for: of their pages, and of a
real Prometheus that scrapes them."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from lensrack import Client
from server.cli.sample_pictures import draw
from tests.conftest import free_port
from tests.deploy.dashboards import ALERTS, PROMETHEUS_OWN, Asked, alerts, panels
from tests.e2e.server_process import ServerProcess, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EVERYTHING = [*alerts(), *panels()]
NOT_HERE = {  # only where there is a CUDA device
    "lensrack_gpu_memory_bytes",
    "lensrack_cuda_graphs",
    "lensrack_cuda_graph_rows_total",
}


@dataclass
class Watched:
    """A server that has done everything once, and where its worker shows its metrics."""

    server: ServerProcess
    worker_url: str
    job: str

    def page(self, url: str) -> dict[str, Metric]:
        text = httpx.get(f"{url}/metrics", timeout=20).text
        return {sample.name: family for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder, port = tmp_path_factory.mktemp("watched"), free_port()
    draw(folder / "pictures", per_class=8)
    settings = {
        "worker_metrics_port": str(port),
        "log_format": "json",
        "log_requests": "1",
        "watch_s": "0.2",
        "rack_slots": "1",
    }
    with serving(folder / "home", **settings) as server, Client(server.url) as client:
        dataset = client.datasets.upload(folder / "pictures" / "fruit" / "train")
        recipe = {"epochs": 2, "prompts": 2, "batch_size": 8}
        job = client.train("fruit", dataset.id, method="vpt_deep", recipe=recipe).wait(timeout=120)
        weather = client.datasets.upload(folder / "pictures" / "weather" / "train")
        client.train("weather", weather.id, method="linear").wait(timeout=120)
        image = next((folder / "pictures" / "fruit" / "test").rglob("*.png")).read_bytes()
        for _ in range(3):
            client.predict("fruit", image)
        client.predict("weather", image)  # there is one slot
        httpx.post(f"{server.url}/predict/nobody", content=image, headers={"content-type": "image/png"})
        time.sleep(0.5)  # the server looks at its stores every 0.2 s
        yield Watched(server, f"http://127.0.0.1:{port}", job.id)


def test_every_series_that_is_asked_for_is_there(watched: Watched):
    pages = [watched.page(watched.server.url), watched.page(watched.worker_url)]
    for asked in EVERYTHING:
        for name, matchers in asked.selectors:
            found = [sample for page in pages if name in page for sample in page[name].samples if sample.name == name]
            if name in NOT_HERE:
                continue
            assert found, f"{asked.where}: neither server nor worker shows {name}"
            for label, operator, value in matchers:
                if label in PROMETHEUS_OWN:
                    continue
                values = {sample.labels.get(label) for sample in found}
                assert None not in values, f"{asked.where}: {name} without {label}"
                assert operator != "=" or value in values, f"{asked.where}: {name} has {label} {values}, not {value}"


def test_what_was_done_is_counted(watched: Watched):
    def value(url: str, name: str, **labels: str) -> float:
        return sum(one.value for one in watched.page(url)[name].samples if one.name == name and one.labels == labels)

    url, worker = watched.server.url, watched.worker_url
    assert value(url, "lensrack_task_rows_total", task="fruit", outcome="answered") == 3
    assert value(url, "lensrack_rack_loads_total", task="fruit") == 1
    assert value(url, "lensrack_rack_hits_total", task="fruit") >= 1
    assert value(url, "lensrack_rack_load_seconds_count", task="fruit") == 1
    assert value(url, "lensrack_store_up", store="bundles") == 1
    assert value(url, "lensrack_rack_evictions_total", task="fruit") == 1
    assert value(url, "lensrack_rack_lenses") == value(url, "lensrack_rack_slots") == 1
    assert value(url, "lensrack_jobs", state="succeeded") == 2
    assert value(url, "lensrack_workers", state="running") == value(url, "lensrack_workers", state="wanted") == 1
    assert value(url, "lensrack_rack_bytes", state="used") > 0
    assert value(url, "lensrack_request_bytes_total", route="/datasets") > 1000
    assert value(worker, "lensrack_training_epochs_total") >= 2
    assert value(worker, "lensrack_training_images_total") > 0
    assert value(worker, "lensrack_job_attempts_total", outcome="succeeded") == 2
    assert value(worker, "lensrack_cache_requests_total", cache="pixels", result="miss") > 0
    assert 'task="nobody"' not in httpx.get(f"{url}/metrics").text


def test_server_and_worker_log_an_object_a_line(watched: Watched):
    lines = [json.loads(line) for line in watched.server.log.splitlines()]
    assert any(line.get("job_id") == watched.job and line["logger"] == "server.worker.trainer" for line in lines)
    assert any(line.get("route") == "/predict/{task}" and line["status"] == 200 for line in lines)
    assert all(line["request_id"] for line in lines if line["logger"] == "server.access")


def test_prometheus_itself_answers_every_panel_and_every_alert(watched: Watched, tmp_path: Path):
    with prometheus(watched, tmp_path) as url:
        for asked in EVERYTHING:
            answer = httpx.get(f"{url}/api/v1/query", params={"query": asked.concrete()}, timeout=20).json()
            assert answer["status"] == "success", (asked, answer)
            if asked in ALL_PANELS and not any(name in NOT_HERE for name, _ in asked.selectors):
                assert answer["data"]["result"], f"{asked.where} would be empty"
        rules = httpx.get(f"{url}/api/v1/rules", timeout=20).json()["data"]["groups"]
        assert {rule["name"]: rule["health"] for group in rules for rule in group["rules"]} == {
            asked.where: "ok" for asked in alerts()
        }
        firing = httpx.get(f"{url}/api/v1/alerts", timeout=20).json()["data"]["alerts"]
        assert not [alert["labels"]["alertname"] for alert in firing if alert["state"] == "firing"]


ALL_PANELS: list[Asked] = list(panels())


class prometheus:  # noqa: N801  # used like the function that it stands for
    """A Prometheus of our own on a free port, which scrapes this server and this worker every second."""

    def __init__(self, watched: Watched, folder: Path) -> None:
        binary = shutil.which("prometheus")
        if binary is None:
            pytest.skip("prometheus is not installed: apt-get install prometheus")
        targets = {"lensrack-server": watched.server.url, "lensrack-worker": watched.worker_url}
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [url.removeprefix("http://")]}]}
                for job, url in targets.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._folder, port = folder, free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            binary,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]

    def __enter__(self) -> str:
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self.url

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while not self._has_seen_enough():
            assert time.monotonic() < deadline, (self._folder / "prometheus.log").read_text()[-2000:]
            time.sleep(0.2)

    def _has_seen_enough(self) -> bool:
        """Both targets are up, with at least three scrapes each: a rate needs two."""
        try:
            query = {"query": 'min(count_over_time(up{job=~"lensrack-.*"}[1m])) >= 3 and count(up == 1) == 2'}
            answer = httpx.get(f"{self.url}/api/v1/query", params=query)
            return answer.status_code == 200 and bool(answer.json()["data"]["result"])
        except httpx.TransportError:
            return False

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
