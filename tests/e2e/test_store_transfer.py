"""A store goes from files into an archive, into Redis and back: the same bytes come out, or it is refused."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prompts_store import Backbone, Bundle, CorruptBundle, Manifest, Preprocess, Store, open_store
from prompts_store.archive import BadArchive
from prompts_store.memory_store import MemoryStore
from prompts_store.transfer import AliasesDiffer, TransferCounts, export_store, import_store
from tests.e2e.server_process import ROOT, environment

MANIFEST = Manifest(
    task="fish",
    method="linear",
    backbone=Backbone("vit", "0" * 64),
    labels=("a", "b"),
    prompt_lengths=(0,),
    preprocess=Preprocess(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0, "squash"),
    metrics={},
    recipe={},
    dataset=None,
    parent=None,
    created_at=1000.0,
    lensrack_version="0.1.0",
)


def bundle(seed: int, task: str = "fish") -> Bundle:
    weight = np.random.default_rng(seed).standard_normal((2, 16), dtype=np.float32)
    return Bundle.build(replace(MANIFEST, task=task, created_at=1000.0 + seed), {"head.weight": weight})


def fill(store: Store) -> None:
    """Two tasks: one with a canary, a rollback and a version that is gone; one that nothing points at."""
    first, second, third, gone = [store.put(bundle(seed)) for seed in range(4)]
    store.put(bundle(7, "bird"))
    for version in (first, gone, second):
        store.set_alias("fish", "live", version)
    store.set_alias("fish", "live", {second: 3, third: 1})
    store.rollback("fish", "live")
    store.set_alias("fish", "best", third)
    store.delete_version("fish", gone)


def content(store: Store) -> dict[str, object]:
    """What must survive: every bundle's bytes, and where every alias points."""
    return {
        task: (
            {info.version: store.get(task, info.version).data for info in store.versions(task)},
            {name: alias.targets for name, alias in store.aliases(task).items()},
        )
        for task in store.tasks()
    }


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(f"file://{tmp_path / 'source'}")) as store:
        fill(store)
        yield store


@pytest.fixture
def archive(source: Store, tmp_path: Path) -> Path:
    export_store(source, tmp_path / "archive")
    return tmp_path / "archive"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", "store", *arguments],
        env=environment(home, {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("suffix", ["", ".tar"])
def test_from_files_to_redis_and_back_by_command(suffix: str, source: Store, redis_url: str, tmp_path: Path) -> None:
    """And on to a second folder of files: three archives, the same to the byte."""
    here = f"file://{tmp_path / 'source'}"
    archives = [tmp_path / f"{name}{suffix}" for name in ("one", "two", "three")]
    there = f"file://{tmp_path / 'other'}"
    steps = [
        ("export", archives[0], here, "exported 4 versions of 2 tasks, 4 of them new in the archive"),
        ("import", archives[0], redis_url, "imported 4 versions of 2 tasks, 4 of them new in the store"),
        ("export", archives[1], redis_url, "exported 4 versions of 2 tasks, 4 of them new in the archive"),
        ("import", archives[1], there, "imported 4 versions of 2 tasks, 4 of them new in the store"),
        ("export", archives[2], there, "exported 4 versions of 2 tasks, 4 of them new in the archive"),
        ("import", archives[2], there, "imported 4 versions of 2 tasks, 0 of them new in the store"),
    ]
    for verb, path, url, said in steps:
        done = command(tmp_path, verb, str(path), "--store", url)
        assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr
    contents = [tree(path) if path.is_dir() else path.read_bytes() for path in archives]
    assert contents[0] == contents[1] == contents[2]
    for url in (redis_url, there):
        with closing(open_store(url)) as store:
            assert content(store) == content(source)
            states = [[(t.version, t.weight) for t in a.targets] for a in store.history("fish", "live")]
            assert len(states) == 4, "the state with the deleted version is passed over"
            assert store.rollback("fish", "live").targets == source.history("fish", "live")[-2].targets


def test_a_damaged_archive_is_refused_and_nothing_written(archive: Path, tmp_path: Path) -> None:
    """Any one byte changed, any one file cut or missing: a refusal, and the store as empty as before."""
    chance = random.Random(4)
    for name, data in tree(archive).items():
        at = chance.randrange(len(data))
        damages = {
            "flipped": data[:at] + bytes([data[at] ^ (1 << chance.randrange(7))]) + data[at + 1 :],
            "cut": data[:at],
            "longer": data + b" x",
            "missing": None,
        }
        for kind, bad in damages.items():
            copy = tmp_path / "copy"
            shutil.copytree(archive, copy)
            (copy / name).unlink()
            if bad is not None:
                (copy / name).write_bytes(bad)
            store = MemoryStore()
            with pytest.raises((BadArchive, CorruptBundle)):
                import_store(store, copy)
            assert store.tasks() == [], f"{kind}: {name}"
            shutil.rmtree(copy)


def test_a_share_that_changed_on_the_way_is_noticed(archive: Path) -> None:
    text = (archive / "store.json").read_text()
    assert text.count("0.25") == 1
    (archive / "store.json").write_text(text.replace("0.25", "0.35"))
    with pytest.raises(BadArchive, match="expected the digest"):
        import_store(MemoryStore(), archive)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["tasks"].update({"../../etc": index["tasks"]["fish"]}),
        lambda index: index["tasks"]["fish"]["versions"].update({"../x": 5}),
        lambda index: index["tasks"]["fish"]["versions"].update({"a" * 64: 2**40}),
        lambda index: index["tasks"]["fish"]["aliases"].update({"live": [[["b" * 64, 1.0]]]}),
        lambda index: index["tasks"]["fish"]["aliases"].update({"live": []}),
        lambda index: index["tasks"]["fish"]["aliases"].update({"live": [[]]}),
        lambda index: index["tasks"]["fish"]["aliases"]["live"][0][0].__setitem__(1, float("nan")),
        lambda index: index["tasks"]["fish"]["aliases"].update(live=index["tasks"]["fish"]["aliases"]["live"] * 50),
        lambda index: index["tasks"]["fish"].update({"versions": {}, "aliases": {}}),
        lambda index: index.update({"format": "lensrack-store-2"}),
        lambda index: index.update({"tasks": []}),
    ],
)
def test_an_index_that_a_stranger_wrote_is_refused(change: object, archive: Path) -> None:
    """With a digest that fits."""
    from prompts_store.archive import _digest

    index = json.loads((archive / "store.json").read_text())
    change(index)  # type: ignore[operator]
    index["digest"] = _digest(index["tasks"])
    (archive / "store.json").write_text(json.dumps(index))
    store = MemoryStore()
    with pytest.raises(BadArchive):
        import_store(store, archive)
    assert store.tasks() == []


def test_a_tar_file_is_not_unpacked_to_where_it_says(archive: Path, tmp_path: Path) -> None:
    """A member that is a link to a file of the disk is no file of the archive."""
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        for name in tree(archive):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, str(archive / name)
            tar.addfile(member)
    with pytest.raises(BadArchive, match=r"store\.json"):
        import_store(MemoryStore(), tmp_path / "evil.tar")
    (tmp_path / "noise.tar").write_bytes(b"noise" * 1000)
    with pytest.raises(BadArchive, match="tar file"):
        import_store(MemoryStore(), tmp_path / "noise.tar")


class Breaks:
    """A store that goes away after so many calls that change it."""

    def __init__(self, store: Store, after: int) -> None:
        self._store, self._left = store, after

    def __getattr__(self, name: str) -> object:
        if name in {"put", "set_alias"}:
            self._left -= 1
            if self._left < 0:
                raise ConnectionError("gone")
        return getattr(self._store, name)


@pytest.mark.parametrize("after", range(9))
def test_an_import_that_broke_off_is_started_again(after: int, archive: Path, source: Store, tmp_path: Path) -> None:
    """At every point where it can break off: four bundles and five states of aliases."""
    store = MemoryStore()
    with pytest.raises(ConnectionError):
        import_store(Breaks(store, after), archive)  # type: ignore[arg-type]
    assert import_store(store, archive).written == max(0, 4 - after)
    assert content(store) == content(source)
    export_store(store, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(archive)


def test_an_export_that_broke_off_goes_on_and_is_no_archive_before(source: Store, tmp_path: Path) -> None:
    class Once:
        """Gives two bundles, and is gone."""

        left = 2

        def __getattr__(self, name: str) -> object:
            if name == "get":
                self.left -= 1
                if self.left < 0:
                    raise ConnectionError("gone")
            return getattr(source, name)

    with pytest.raises(ConnectionError):
        export_store(Once(), tmp_path / "half")  # type: ignore[arg-type]
    with pytest.raises(BadArchive, match="did not finish"):
        import_store(MemoryStore(), tmp_path / "half")
    for version in [source.put(bundle(seed)) for seed in (10, 11, 12)]:
        source.set_alias("fish", "live", version)
    assert export_store(source, tmp_path / "half") == TransferCounts(tasks=2, versions=7, written=5)
    with pytest.raises(ConnectionError):
        export_store(Once(), tmp_path / "half.tar")  # type: ignore[arg-type]
    assert not list(tmp_path.glob("half.tar*"))


def test_an_update_that_broke_off_leaves_the_archive_of_before(source: Store, archive: Path) -> None:
    before = content(source)
    new = source.put(bundle(9))
    source.set_alias("fish", "live", new)
    (archive.parent / "source" / "tasks" / "fish" / "versions" / f"{new}.safetensors").write_bytes(b"noise")
    with pytest.raises(CorruptBundle):
        export_store(source, archive)
    store = MemoryStore()
    import_store(store, archive)
    assert content(store) == before


def test_an_earlier_export_is_brought_up_to_date(source: Store, archive: Path) -> None:
    """What was damaged in it since is mended, what is there is left."""
    damaged = next(archive.glob("tasks/fish/*.safetensors"))
    damaged.write_bytes(b"noise")
    new = source.put(bundle(9))
    source.set_alias("fish", "live", new)
    assert export_store(source, archive).written == 2
    store = MemoryStore()
    import_store(store, archive)
    assert content(store) == content(source)


def test_a_folder_of_something_else_is_left_alone(source: Store, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"x")
    with pytest.raises(BadArchive, match=r"me\.jpg"):
        export_store(source, tmp_path / "photos")
    assert list((tmp_path / "photos").iterdir()) == [tmp_path / "photos" / "me.jpg"]


def test_what_is_damaged_in_the_store_is_not_exported(source: Store, tmp_path: Path) -> None:
    """Whether its header can still be read, so that the store lists it, or not."""
    version = source.aliases("fish")["best"].targets[0].version
    path = next((tmp_path / "source").rglob(f"{version}*"))
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), b"noise"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptBundle, match=version):
            export_store(source, tmp_path / "archive")
        assert not (tmp_path / "archive" / "store.json").exists()


def test_an_alias_that_went_another_way_is_kept_unless_told_otherwise(archive: Path, source: Store) -> None:
    store = MemoryStore()
    other = store.put(bundle(20))
    store.set_alias("fish", "live", other)
    before = content(store)
    with pytest.raises(AliasesDiffer, match="alias live"):
        import_store(store, archive)
    assert content(store) == before
    import_store(store, archive, overwrite=True)
    assert store.aliases("fish")["live"].targets == source.aliases("fish")["live"].targets
    assert store.history("fish", "live")[0].targets[0].version == other
    assert other in [info.version for info in store.versions("fish")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "x", "--store", "redis://:hunter2@127.0.0.1:1/0"], "did not answer"),
        (["export", "x", "--store", "ftp://hunter2"], "expected file://DIR"),
        (["import", "nowhere.tar"], "No such file"),
    ],
)
def test_a_failure_is_a_sentence(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = command(tmp_path, arguments[0], str(tmp_path / arguments[1]), *arguments[2:])
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr
