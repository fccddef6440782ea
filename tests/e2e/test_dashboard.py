"""A person who never reads the API: trains, asks, corrects, publishes and goes back, in a real browser on a real server
with its worker. The tests tell one story and lean on each other's tasks; whatever the console says fails them."""

from __future__ import annotations

import base64
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from lensrack import Client
from server.cli.sample_pictures import draw
from tests.e2e.browser import Browser, browser
from tests.e2e.server_process import ServerProcess, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PICTURE = 'input[accept="image/*"]'


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder)
    return folder


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(chrome: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """After the browser: where there is none, no server is started."""
    with serving(tmp_path_factory.mktemp("dashboard"), worker_nice="0", rack_slots="32") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url) as asked:
        yield asked


@pytest.fixture
def page(chrome: Browser, server: ServerProcess) -> Iterator[Browser]:
    """The front page, light and as wide as a desk's; at the end the console must have been silent."""
    chrome.resize(1280, 900)
    chrome.colours("light")
    chrome.go("about:blank")
    chrome.go(f"{server.url}/")
    chrome.find("h1")
    yield chrome
    assert chrome.complaints() == []


def archive(folder: Path, per_class: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for label in sorted(folder.iterdir()):
            for picture in sorted(label.iterdir())[:per_class]:
                packed.write(picture, f"{label.name}/{picture.name}")
    return file.getvalue()


def choose(page: Browser, name: str, value: str) -> None:
    page.press(f'input[name="{name}"][value="{value}"]')


def type_into(page: Browser, css: str, text: str) -> None:
    field = page.find(css)
    field.clear()
    field.send_keys(text)


def finished(page: Browser) -> None:
    page.find(".tag.succeeded")
    page.find("h2", "Try it")


# --- the story --------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_task_that_answers_on_the_same_page(
    page: Browser, client: Client, pictures: Path, tmp_path: Path
) -> None:
    page.press("a", "Train your first task")
    page.hidden("input[webkitdirectory]").send_keys(str(pictures / "fruit" / "train"))
    page.find(".report", "72 pictures in 3 classes")
    assert [one.text for one in page.all(".classes strong")] == ["lemon", "lime", "plum"]
    shown = "return [...document.querySelectorAll('.classes img')].filter(one => one.naturalWidth > 0).length"
    page.until(lambda: page.script(shown) == 18, "thumbnails")
    sent = "return performance.getEntriesByType('resource').map(one => new URL(one.name).pathname)"
    assert any(re.fullmatch("/uploads/.+", path) for path in page.script(sent)), "a large archive goes in pieces"
    type_into(page, 'input[name="task"]', "fruit")
    choose(page, "method", "linear")
    assert page.barriers() == []
    page.press("button", "Start training")
    finished(page)
    page.find("h2", "6 of 6 trials")
    page.find(".figures", "Calibration error")
    page.hidden(PICTURE).send_keys(str(pictures / "fruit" / "test" / "plum" / "000.png"))
    page.find(".best", "plum")
    assert page.barriers() == []
    [dataset] = client.datasets.list()
    assert (dataset.name, dataset.images) == ("train", 72)


def test_live_curves_of_a_second_task_from_an_archive(page: Browser, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "My Weather.zip"
    file.write_bytes(archive(pictures / "weather" / "train", 4))
    page.press("nav a", "Train")
    page.hidden('input[accept^=".zip"]').send_keys(str(file))
    page.find(".warnings", "fewer than 10 training pictures")
    assert page.find('input[name="task"]').get_attribute("value") == "my-weather"
    choose(page, "method", "vpt_deep")
    choose(page, "search", "none")
    page.press("summary", "More settings")
    type_into(page, 'input[name="epochs"]', "3")
    page.press("button", "Start training")
    page.find("h2", "Learning curves")
    finished(page)
    canvas = page.find(".learning canvas")
    assert "after epoch 3:" in str(canvas.get_attribute("aria-label"))


def test_a_picture_is_asked_of_both_and_shows_where_they_looked(page: Browser, pictures: Path) -> None:
    page.press("nav a", "Predict")
    page.hidden(PICTURE).send_keys(str(pictures / "weather" / "test" / "snow" / "001.png"))
    page.until(lambda: len(page.all(".answer .scores")) == 2, "two answers side by side")
    assert re.search(r"decoding [\d.]+\sms · queueing [\d.]+\sms · computing [\d.]+\sms", page.text)
    card = '.answer[aria-label="Prediction for my-weather"]'
    page.press(f"{card} button", "Show attention")
    page.find(f"{card} p", "to the learned prompts")
    heat = page.find("canvas.heat")
    assert (heat.get_attribute("width"), heat.get_attribute("height")) == ("8", "8")
    over_all = heat.get_attribute("aria-label")
    page.press(f"{card} label", "Last layer")
    assert page.find("canvas.heat").get_attribute("aria-label") is not None
    assert over_all is not None
    assert page.barriers() == []


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_may_be_dropped_or_pasted(page: Browser, server: ServerProcess, way: str) -> None:
    """In a format that the server does not take: the browser converts it."""
    page.press("nav a", "Predict")
    page.find(".drop")
    page.script(
        """const canvas = new OffscreenCanvas(40, 40); canvas.getContext('2d').fillRect(0, 0, 40, 40);
        canvas.convertToBlob({type: 'image/png'}).then(blob => {
          const carried = new DataTransfer();
          carried.items.add(new File([blob], 'black.gif', {type: 'image/gif'}));
          const known = {dataTransfer: carried, clipboardData: carried, bubbles: true, cancelable: true};
          const event = arguments[0] === 'drop' ? new DragEvent('drop', known) : new ClipboardEvent('paste', known);
          document.querySelector('.drop').dispatchEvent(event);
        });""",
        way,
    )
    page.until(lambda: len(page.all(".answer .scores")) == 2, "answers")


def test_a_correction_reaches_the_next_version(page: Browser, client: Client, pictures: Path) -> None:
    before = client.tasks.get("fruit").live
    page.press("nav a", "Predict")
    page.hidden(PICTURE).send_keys(str(pictures / "fruit" / "test" / "plum" / "001.png"))
    card = '.answer[aria-label="Prediction for fruit"]'
    page.press(f"{card} button", "Correct it")
    type_into(page, f"{card} .correct input", "limo")
    page.press(f"{card} .correct button", "Save correction")
    page.find("dialog h2", "fruit has no class “limo”")
    assert page.barriers() == []
    page.press("dialog label", "Add the new class “limo”")
    page.press("dialog button", "Save correction")
    page.find(f"{card} p", "has 1 picture so far; it is left out of training until it has 2")
    assert client.tasks.feedback("fruit").labels == {"limo": 1}
    page.press(f"{card} button", "Correct it")
    type_into(page, f"{card} .correct input", "limo")
    page.press(f"{card} .correct button", "Save correction")
    page.press("dialog label", "I meant “lime”")
    page.press("dialog button", "Save correction")
    page.until(lambda: client.tasks.feedback("fruit").labels == {"lime": 1}, "the correction")
    page.until(lambda: "1 correction" in page.text and "so far" not in page.text, "the new notice")
    page.press(f"{card} button", "Retrain with corrections")
    finished(page)
    after = client.tasks.get("fruit").live
    assert after is not None
    assert after != before
    corrected = client.datasets.get(str(client.tasks.version("fruit", after).dataset))
    assert (corrected.images, corrected.name) == (73, "fruit, corrected")


def weights(client: Client) -> dict[str, float]:
    [live] = [alias for alias in client.tasks.get("fruit").aliases if alias.name == "live"]
    return {target.version: round(target.weight, 2) for target in live.targets}


def test_canary_lost_race_promotion_and_rollback(page: Browser, client: Client) -> None:
    new, old = [one.version for one in client.tasks.versions("fruit")]
    assert weights(client) == {new: 1}
    page.press("a.name", "fruit")
    page.press(f'button[aria-label="Canary {old[:10]}"]')
    page.find("dialog output", "10 %")
    assert page.barriers() == []
    page.press("dialog button", "Start canary")
    page.find(".split", "10 %")
    assert weights(client) == {new: 0.9, old: 0.1}
    client.tasks.set_alias("fruit", "live", new)  # somebody else, while the page still shows the canary
    page.press(f'button[aria-label="Promote {old[:10]}"]')
    page.press("dialog button", "Promote")
    page.find(".toast", "The live version of fruit has changed in the meantime")
    assert [one for one in page.complaints() if "412 (Precondition Failed)" not in one] == []
    assert weights(client) == {new: 1}
    page.until(lambda: not page.all(".split"), "the page as it is now")
    page.press(f'button[aria-label="Promote {old[:10]}"]')
    page.press("dialog button", "Cancel")
    assert weights(client) == {new: 1}
    page.press(f'button[aria-label="Promote {old[:10]}"]')
    page.press("dialog button", "Promote")
    page.find(".toast", f"now answers with {old[:10]}")
    assert weights(client) == {old: 1}
    page.until(lambda: page.all("tr", old[:10])[0].find_elements("css selector", ".tag.on"), "the old one is live")
    page.press("button", "Roll back")
    page.press("dialog button", "Roll back")
    page.find(".toast", f"is rolled back to {new[:10]}")
    assert weights(client) == {new: 1}


def test_the_rack_moves_while_it_is_watched(page: Browser, client: Client, pictures: Path) -> None:
    page.press("nav a", "Rack")
    page.find("h2", "Batch composition")
    told = int(page.find(".figures div:last-child dd").text)
    for picture in sorted((pictures / "fruit" / "test" / "lime").iterdir()):
        client.predict("fruit", picture)
    page.until(lambda: int(page.find(".figures div:last-child dd").text) == told + 8, "rows answered")
    page.find(".of-rack table th", "fruit")
    assert page.script("return document.querySelectorAll('.slots > span').length") == 32
    assert page.script("return document.querySelectorAll('.slots > .taken').length") >= 2


# --- what must never happen -------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>"


def test_what_users_type_is_text_and_never_markup(
    page: Browser, client: Client, pictures: Path, server: ServerProcess
) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for label, source in ((HOSTILE, "plum"), ("<b>bold</b>".replace("/", "∕"), "lime")):
            for picture in sorted((pictures / "fruit" / "train" / source).iterdir())[:3]:
                packed.write(picture, f"{label}/{picture.name}")
    dataset = client.datasets.upload(io.BytesIO(file.getvalue()), name=f"{HOSTILE}'\"")
    client.train("hostile", dataset.id, method="linear", recipe={"epochs": 2}).wait(timeout=120)
    page.go(f"{server.url}/#/train/hostile")
    page.find(".classes strong", HOSTILE)
    page.find(".report", f"{HOSTILE}'\"")
    page.go(f"{server.url}/#/tasks/hostile")
    page.find(".matrix th", HOSTILE[:20])
    page.go(f"{server.url}/#/ask/hostile")
    page.hidden(PICTURE).send_keys(str(pictures / "fruit" / "test" / "plum" / "000.png"))
    page.find(".scores", HOSTILE)
    assert page.script("return document.querySelectorAll('img[src=\"x\"], main b').length") == 0
    assert (
        page.script("try { document.body.innerHTML = '<i>'; return 'taken' } catch { return 'refused' }") == "refused"
    )
    assert all("'TrustedHTML'" in one for one in page.complaints())


def test_a_zip_made_in_the_browser_is_one_everywhere(page: Browser) -> None:
    """Names in any script, empty files, and more files than a plain zip can count."""
    encoded = page.chrome.execute_async_script(
        """const done = arguments[0];
        import('/ui/zip.js').then(async ({ zipOf }) => {
          const file = n => new File(n ? [] : ['first'], 'x');
          const blob = await zipOf(Array.from({length: 66000}, (_, n) => ({path: `класс/${n}.png`, file: file(n)})));
          const reader = new FileReader();
          reader.onload = () => done(reader.result.split(',')[1]);
          reader.readAsDataURL(blob);
        }).catch(error => done('failed ' + error));"""
    )
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(encoded))) as packed:
        assert len(packed.namelist()) == 66_000
        assert packed.read("класс/0.png") == b"first"
        assert packed.namelist()[-1] == "класс/65999.png"
        assert packed.getinfo("класс/1.png").compress_type == zipfile.ZIP_STORED


# --- everybody --------------------------------------------------------------------------------------------------------

PAGES = ["/tasks", "/tasks/fruit", "/tasks/my-weather", "/ask", "/train", "/train/fruit", "/rack"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_open_to_everybody_on_a_phone_too(page: Browser, server: ServerProcess, scheme: str) -> None:
    page.colours(scheme)
    for width in (390, 1280):
        page.resize(width, 844)
        for path in PAGES:
            page.go("about:blank")
            page.go(f"{server.url}/#{path}")
            page.find("h1")
            assert page.barriers() == [], (path, scheme, width)
            assert page.script("return document.documentElement.scrollWidth") <= width, (path, width)
    ground = page.script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) is (scheme == "dark")


def test_the_colours_are_the_visitors_choice_and_stay(page: Browser) -> None:
    def chosen() -> str:
        return str(page.script("return document.documentElement.dataset.theme ?? ''"))

    page.press("#theme")
    page.press("#theme")
    assert chosen() == "dark"
    page.chrome.refresh()
    page.find("h1")
    assert chosen() == "dark"
    page.press("#theme")
    assert chosen() == ""


def focused(page: Browser) -> str:
    return str(
        page.script("const a = document.activeElement; return a.getAttribute('aria-label') || a.textContent.trim()")
    )


def press_keys(page: Browser, *keys: str) -> None:
    page.chrome.switch_to.active_element.send_keys(*keys)


def tab_to(page: Browser, text: str) -> None:
    for _ in range(60):
        press_keys(page, Keys.TAB)
        if focused(page).startswith(text):
            return
    raise AssertionError(f"the keyboard never comes to {text!r}; it ended at {focused(page)!r}")


def test_everything_by_keyboard_alone(page: Browser, client: Client, pictures: Path) -> None:
    new, old = [one.version for one in client.tasks.versions("fruit")]
    assert weights(client) == {new: 1}
    press_keys(page, Keys.TAB)
    assert focused(page) == "Skip to content"
    press_keys(page, Keys.ENTER)
    assert page.script("return document.activeElement.id") == "main"
    tab_to(page, "fruit")
    press_keys(page, Keys.ENTER)
    page.find("h1", "fruit")
    assert page.script("return document.activeElement.id") == "main", "the new page is where the keyboard is"
    tab_to(page, f"Promote {old[:10]}")
    press_keys(page, Keys.ENTER)
    page.find("dialog")
    press_keys(page, Keys.ESCAPE)
    page.until(lambda: not page.all("dialog"), "the question to be gone")
    assert focused(page) == f"Promote {old[:10]}"
    press_keys(page, Keys.ENTER)
    page.find("dialog")
    tab_to(page, "Promote")
    press_keys(page, Keys.ENTER)
    page.find(".toast", f"now answers with {old[:10]}")
    assert weights(client) == {old: 1}
