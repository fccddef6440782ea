"""`python -m tests.e2e.screenshots FOLDER`: the pictures of the dashboard that the documentation shows, taken anew."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from lensrack import Client
from server.samples import draw
from tests.e2e.browser import Browser, browser
from tests.e2e.server_process import serving

MOST_BYTES = 200_000
SETTLE_S = 0.6  # until thumbnails and charts stand


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, browser() as page:
        draw(Path(home) / "pictures")
        with serving(Path(home) / "home", worker_nice="0", rack_slots="128") as server, Client(server.url) as client:
            jobs = trained(client, Path(home) / "pictures")
            used(client, Path(home) / "pictures")
            page.colours("light")
            photographed(page, server.url, folder, Path(home) / "pictures", jobs)


def trained(client: Client, pictures: Path) -> dict[str, str]:
    """Two tasks, one of them with two versions and a canary; the jobs by name."""
    fruit, weather = (client.datasets.upload(pictures / name, name=name) for name in ("fruit", "weather"))
    head = client.train("fruit", fruit.id, method="linear", recipe={"search": "none", "epochs": 6})
    head.wait(timeout=300)
    prompts = client.train("fruit", fruit.id, method="vpt_deep", recipe={"epochs": 8}, publish="never")
    new = prompts.wait(timeout=600).version
    client.tasks.set_alias("fruit", "live", str(new), weight=0.2)
    client.train("weather", weather.id, method="vpt_deep", recipe={"epochs": 5}).wait(timeout=600)
    return {"prompts": prompts.id}


def used(client: Client, pictures: Path) -> None:
    for name in ("fruit", "weather"):
        for picture in sorted((pictures / name / "test").rglob("*.png")):
            client.predict(name, picture)


def photographed(page: Browser, url: str, folder: Path, pictures: Path, jobs: dict[str, str]) -> None:
    def shown(path: str, *, height: int = 800, width: int = 1280) -> None:
        page.resize(width, height)
        page.go("about:blank")
        page.go(f"{url}/#{path}")
        page.find("h1")

    shown("/tasks", height=420)
    kept(page, folder / "tasks.png")
    shown("/tasks/fruit", height=1440)
    page.find(".matrix")
    kept(page, folder / "task.png")
    shown("/ask", height=860)
    page.hidden('input[accept="image/*"]').send_keys(str(pictures / "fruit" / "test" / "lemon" / "002.png"))
    page.press('.answer[aria-label="Answer of weather"] button', "Where it looked")
    page.find("canvas.heat")
    kept(page, folder / "ask.png")
    shown(f"/jobs/{jobs['prompts']}", height=860)
    page.find("h2", "Ask it")
    kept(page, folder / "job.png")
    page.colours("dark")
    shown("/rack", height=960)
    for _ in range(3):
        kept(page, folder / "rack-dark.png")
    shown("/ask/fruit", width=390, height=844)
    page.hidden('input[accept="image/*"]').send_keys(str(pictures / "fruit" / "test" / "plum" / "001.png"))
    page.find(".best")
    kept(page, folder / "phone-dark.png")


def kept(page: Browser, file: Path) -> None:
    """A PNG of few colours, small enough for a repository."""
    time.sleep(SETTLE_S)
    page.chrome.save_screenshot(str(file))
    with Image.open(file) as shot:
        small = shot.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(file, optimize=True)
    size = file.stat().st_size
    print(f"{file} {size // 1000} KB")
    if size > MOST_BYTES:
        raise SystemExit(f"{file} has {size} bytes, expected at most {MOST_BYTES}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
