"""What `make release` builds: the SDK alone, which works in a bare environment against a running server."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.e2e.server_process import ROOT, ServerProcess

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SEVEN = ROOT / "server" / "bundled" / "pictures" / "7.png"


def release(dist: Path) -> str:
    own = {**os.environ, "PYTHON": sys.executable, "DIST": str(dist), "IMAGES": ""}
    done = subprocess.run(
        [ROOT / "deploy" / "release.sh"], env=own, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    release(folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [wheel] = dist.glob("*.whl")
    return wheel


def test_the_wheel_is_the_sdk_and_light(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [told] = [name for name in names if name.endswith("METADATA")]
        metadata = Parser().parsestr(archive.read(told).decode())
    assert {name.split("/")[0] for name in names} == {"lensrack", f"lensrack-{VERSION}.dist-info"}
    assert {"lensrack/py.typed", "lensrack/cli.py", "lensrack/wire.py"} <= set(names)
    assert metadata["Version"] == VERSION
    needs = [Requirement(one) for one in metadata.get_all("Requires-Dist", [])]
    assert {one.name for one in needs if one.marker is None} == {"httpx", "pydantic", "rich", "typer"}
    assert {"server", "resize", "plot"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_same_source_gives_the_same_wheel(wheel: Path, dist: Path, tmp_path: Path) -> None:
    """Also by way of the source archive, which holds all that is needed."""
    [source] = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again"],
        cwd=unpacked,
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert (tmp_path / "again" / wheel.name).read_bytes() == wheel.read_bytes()


def test_images_are_named_and_not_built(tmp_path: Path) -> None:
    told = release(tmp_path / "dist")
    for variant in ("cpu", "cuda"):
        assert f"docker build -t lensrack:{VERSION}-{variant} --build-arg VARIANT={variant}" in told
    assert re.search(rf"^[0-9a-f]{{64}}  lensrack-{re.escape(VERSION)}-py3-none-any\.whl$", told, re.MULTILINE)


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("CHANGELOG.md", f"## {VERSION}", "CHANGELOG.md to begin with"),
        ("Dockerfile", f"ARG VERSION={VERSION}", "in Dockerfile"),
        ("deploy/helm/lensrack/Chart.yaml", f"appVersion: {VERSION}", "appVersion"),
    ],
)
def test_a_copy_of_the_version_that_was_forgotten_is_named(tmp_path: Path, file: str, line: str, says: str) -> None:
    for name in (
        "pyproject.toml",
        "CHANGELOG.md",
        "Dockerfile",
        "deploy/release.sh",
        "deploy/helm/lensrack/Chart.yaml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text().replace(line if name == file else "\0", "another"))
    done = subprocess.run(
        ["bash", tmp_path / "deploy" / "release.sh"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert says in done.stderr


# --- in a bare environment --------------------------------------------------------------------------------------------


def needed(name: str, seen: dict[str, Distribution]) -> None:
    """The distributions that `name` needs without extras, itself among them."""
    found = distribution(name)
    if found.metadata["Name"] in seen:
        return
    seen[found.metadata["Name"]] = found
    for text in found.requires or ():
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            needed(one.name, seen)


def borrowed() -> Iterator[Path]:
    """What is installed of the four packages that the wheel asks for, and of what these ask for."""
    seen: dict[str, Distribution] = {}
    for name in ("httpx", "pydantic", "rich", "typer"):
        needed(name, seen)
    for found in seen.values():
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        yield from (Path(str(found.locate_file(top))) for top in tops)


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and what it asks for, and nothing else."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    for path in borrowed():
        (packages / path.name).symlink_to(path)
    install = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-index", "--no-deps"]
    subprocess.run([*install, "-q", wheel], check=True, capture_output=True, timeout=120)
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_works_against_a_running_server(bare: Path, server: ServerProcess, tmp_path: Path) -> None:
    own = {"LENSRACK_URL": server.url, "PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    def call(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)), env=own, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = inspect.cleandoc(f"""
        import importlib.util, lensrack
        assert "bare" in lensrack.__file__ and lensrack.__version__ == {VERSION!r}
        assert not any(map(importlib.util.find_spec, ["torch", "numpy", "PIL", "server", "fastapi"]))
        with lensrack.Client() as client:
            assert client.ready().ready
            print(client.predict("digits", {str(SEVEN)!r}).label)
        try:
            lensrack.Client(client_resize=True)
        except lensrack.InvalidInput as error:
            print(error)
    """)
    assert call(bare / "lensrack", "--version").strip() == VERSION
    assert call(bare / "lensrack", "predict", "digits", SEVEN, "--top-k", 1).split()[-2] == "7"
    told = call(bare / "python", "-c", program)
    assert told.splitlines()[0] == "7"
    assert "needs Pillow" in told
