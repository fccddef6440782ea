"""A method from outside is one installed package: fitted, served, mixed; engine, batching, api know nothing of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lensrack import Client
from server.methods.registry import Registry
from tests.e2e import toy_method
from tests.e2e.server_process import ServerProcess, environment, serving

ENTRY = "[lensrack.methods]\nlast_prompt = toy_method:LastPrompt\n"


def install(folder: Path, entry: str = ENTRY) -> Path:
    """What `pip install` would leave of a package with one module and one entry point."""
    about = folder / "toy_method-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-method\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(entry)
    shutil.copy(Path(toy_method.__file__), folder / "toy_method.py")
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with serving(tmp_path / "home", installed=[install(tmp_path / "site")], workers="1") as running:
        yield running


@pytest.mark.slow
def test_it_is_fitted_served_and_mixed(server: ServerProcess, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "server", "sample", str(tmp_path / "pictures")],
        env=environment(server.home, {}),
        check=True,
    )
    fruit = tmp_path / "pictures" / "fruit"
    lemon = fruit / "test" / "lemon" / "000.png"
    with Client(server.url) as client:
        dataset = client.datasets.upload(fruit / "train").id
        job = client.train("toy", dataset, "last_prompt", {"search": "none"}).wait(timeout=200)
        assert job.metrics["val_accuracy"] >= 0.8
        client.train("plain", dataset, "linear", {"epochs": 60}).wait(timeout=100)
        [version] = client.tasks.versions("toy")
        assert (version.method, version.prompt_lengths) == ("last_prompt", [0, 0, 0, 0, 0, 4])
        assert client.predict("toy", lemon).label == "lemon"
        both = client.predict_many(["toy", "plain"], lemon)
        assert both["toy"].label == both["plain"].label == "lemon"
        # it takes part in comparisons and ensembles like any other
        compared = client.compare("toy", dataset, ["last_prompt", "linear"], seeds=[0], recipe={"epochs": 1})
        compared.wait(timeout=200)
        rows = {row.method: row for row in client.comparison(compared.id).rows}
        assert rows["last_prompt"].lens_bytes > rows["linear"].lens_bytes
        client.tasks.set_alias("toy", "again", version.version)
        assert client.predict("toy@live+again", lemon).versions == (version.version,) * 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "linear"}, "there is a method 'linear' already"),
        ({"name": "full"}, "there is a method 'full' already"),
        ({"name": "compare"}, "there is a method 'compare' already"),
        ({"name": "No Name"}, "a method's name looks like"),
    ],
)
def test_a_name_that_is_taken_or_is_none_is_refused(change: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Registry().register(type("Odd", (toy_method.LastPrompt,), change)())


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(ValueError, match="is no method: it has no meaning, defaults"):
        Registry().register(type("Half", (), {"name": "half"})())  # type: ignore[arg-type]


def test_a_server_with_a_broken_method_does_not_start(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "[lensrack.methods]\nlinear = toy_method:head_init\n")
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--port", "0"],
        env=environment(tmp_path / "home", {}, [site]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "the server cannot start" in done.stderr
    assert "is no method" in done.stderr
    assert "Traceback" not in done.stderr
