"""`python -m tests.e2e.screenshots FOLDER [BACKBONE WEIGHTS]`: the dashboard as the documentation shows it.

With a trained backbone, given as a timm architecture and its file of weights, there is something to see in attention.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from lensrack import Client
from server.cli.sample_pictures import draw
from tests.e2e.browser import Browser, browser
from tests.e2e.server_process import serving

MOST_BYTES = 200_000
SETTLE_S = 0.6  # until thumbnails and charts stand
WATCHED_S = 14  # of traffic on the rack's curve


def main(folder: Path, *backbone: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(zip(("backbone", "backbone_weights"), backbone, strict=False))
    with tempfile.TemporaryDirectory() as home, browser() as page:
        pictures = Path(home) / "pictures"
        draw(pictures)
        with serving(Path(home) / "home", worker_nice="0", rack_slots="128", **settings) as server:
            with Client(server.url) as client:
                job = trained(client, pictures)
            photographed(page, server.url, folder, pictures, job)


def trained(client: Client, pictures: Path) -> str:
    """Two tasks, one of them with a canary; the id of the job to show."""
    fruit, weather = (client.datasets.upload(pictures / name, name=name) for name in ("fruit", "weather"))
    client.train("fruit", fruit.id, method="linear", recipe={"search": "none", "epochs": 6}).wait(timeout=300)
    prompts = client.train("fruit", fruit.id, method="vpt_deep", recipe={"epochs": 8}, publish="never")
    new = prompts.wait(timeout=900).version
    client.tasks.set_alias("fruit", "live", str(new), weight=0.2)
    client.train("weather", weather.id, method="vpt_deep", recipe={"epochs": 5}).wait(timeout=900)
    return str(prompts.id)


@contextmanager
def traffic(url: str, pictures: Path) -> Iterator[None]:
    """Three clients ask both tasks, now and then."""
    stop = threading.Event()

    def ask(name: str) -> None:
        with Client(url) as client:
            for round_ in range(10_000):
                for picture in sorted((pictures / name / "test").rglob("*.png")):
                    client.predict(name, picture)
                    if stop.wait(0.05 + 0.1 * (round_ % 2)):
                        return

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("fruit", "weather", "fruit")]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def photographed(page: Browser, url: str, folder: Path, pictures: Path, job: str) -> None:
    def shown(path: str, *, height: int = 800, width: int = 1280) -> None:
        page.resize(width, height)
        page.go("about:blank")
        page.go(f"{url}/#{path}")
        page.find("h1")

    def asked(picture: str) -> None:
        page.hidden('input[accept="image/*"]').send_keys(str(pictures / picture))
        page.find(".best")

    page.chrome.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    page.colours("dark")
    with traffic(url, pictures):
        shown("/rack", height=960)
        time.sleep(WATCHED_S)
        kept(page, folder / "rack-dark.png")
    shown("/ask/fruit", width=390, height=844)
    asked("fruit/test/plum/001.png")
    kept(page, folder / "phone-dark.png")
    page.colours("light")
    shown("/tasks", height=420)
    kept(page, folder / "tasks.png")
    shown("/tasks/fruit", height=1440)
    page.find(".matrix")
    kept(page, folder / "task.png")
    shown("/ask", height=860)
    asked("weather/test/sunny/002.png")
    page.press('.answer[aria-label="Prediction for weather"] button', "Show attention")
    page.find("canvas.heat")
    kept(page, folder / "ask.png")
    shown(f"/jobs/{job}", height=860)
    page.find("h2", "Try it")
    kept(page, folder / "job.png")


def kept(page: Browser, file: Path) -> None:
    """A PNG small enough for a repository, with fewer colours if need be."""
    page.script("scrollTo(0, 0)")
    time.sleep(SETTLE_S)
    page.chrome.save_screenshot(str(file))
    with Image.open(file) as shot:
        whole = shot.convert("RGB")
    whole.save(file, optimize=True)
    if file.stat().st_size > MOST_BYTES:
        whole.quantize(256).save(file, optimize=True)
    size = file.stat().st_size
    print(f"{file} {size // 1000} KB")
    if size > MOST_BYTES:
        raise SystemExit(f"{file} has {size} bytes, expected at most {MOST_BYTES}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
