"""Bundles in files: what a kill, a full disk, damage and strangers leave."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from prompts_store import (
    CorruptAliases,
    CorruptBundle,
    StoreUnavailable,
)
from prompts_store.file_store import FileStore
from tests.prompts_store.stores import (
    bundle,
    child,
    consistent,
    finish,
    two_versions,
)

CRASH = """
import signal

def crash_at(step):
    left = step
    def crashing(call):
        def wrapped(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **kwargs)
        return wrapped
    for name in ("fsync", "replace", "unlink", "mkdir", "open"):
        setattr(os, name, crashing(getattr(os, name)))

def changes(store):
    store.put(bundle(3))
    store.set_alias("fish", "live", {bundle(1).version: 1, bundle(3).version: 1})
    store.put(bundle(1, "new"))
    store.delete_version("fish", bundle(2).version)
    store.delete_task("cat")

for step in itertools.count():
    root = Path(sys.argv[1], str(step))
    store = FileStore(root)
    for task in ("fish", "cat"):
        one, two = two_versions(store, task)
        store.set_alias(task, "live", {one: 1, two: 1} if task == "cat" else one)
    pid = os.fork()
    if pid == 0:
        crash_at(step)
        changes(store)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    consistent(root)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
print(step)
"""


def test_a_kill_at_any_step_leaves_a_consistent_store(tmp_path: Path) -> None:
    """kill -9 before the n-th call that changes the disk, for every n until the changes get through."""
    assert int(finish(child(CRASH, str(tmp_path)))) >= 20


@pytest.mark.parametrize("limit", [0, 1, 100, 900])
def test_a_kill_within_a_write_leaves_a_consistent_store(tmp_path: Path, limit: int) -> None:
    """The kernel kills the child once a file of its has `limit` bytes, so that exactly these reach the disk."""
    code = """
import resource, signal
store = FileStore(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
store.put(bundle(9, size=4000))
"""
    FileStore(tmp_path).put(bundle(1))
    process = child(code, str(tmp_path), str(limit))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGXFSZ
    consistent(tmp_path)
    assert [info.version for info in FileStore(tmp_path).versions("fish")] == [bundle(1).version]


def test_a_kill_in_the_middle_of_writing_leaves_a_consistent_store(tmp_path: Path) -> None:
    """Bigger bundles, and a kill whenever: within write() as well as between calls."""
    code = """
store = open_store(sys.argv[1])
print("writing", flush=True)
for number in itertools.count():
    store.set_alias("fish", "live", store.put(bundle(number, size=200_000)))
"""
    root = tmp_path / "store"
    for delay_s in (0.01, 0.05, 0.11):
        process = child(code, f"file://{root}")
        assert process.stdout.readline() == "writing\n"
        time.sleep(delay_s)
        process.kill()
        process.communicate()
        consistent(root)


def test_a_file_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill cannot show this, a power cut would: the bytes, then the rename, then the folder reach the disk."""
    store = FileStore(tmp_path)
    store.put(bundle(1))
    steps: list[str] = []
    fsync, replace_file = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "bytes")
        fsync(descriptor)

    def noted_replace(old: Path, new: Path) -> None:
        steps.append("rename")
        replace_file(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    store.put(bundle(2))
    store.set_alias("fish", "live", bundle(2).version)
    assert steps == ["bytes", "rename", "folder"] * 2
    store.delete_version("fish", bundle(1).version)
    assert steps[6:] == ["folder"]


def test_the_folder_is_readable_by_a_person(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    one, _ = two_versions(store)
    store.set_alias("fish", "live", one)
    assert (tmp_path / "tasks" / "fish" / "versions" / f"{one}.safetensors").read_bytes() == bundle(1).data
    assert one in (tmp_path / "tasks" / "fish" / "aliases.json").read_text()


def test_strangers_in_the_folder_are_ignored(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put(bundle(1))
    versions = tmp_path / "tasks" / "fish" / "versions"
    for path in (tmp_path / "tasks" / ".DS_Store", versions / "notes.txt", versions / "short.safetensors"):
        path.write_text("hello")
    (tmp_path / "tasks" / "Not A Task").mkdir()
    assert store.tasks() == ["fish"]
    assert len(store.versions("fish")) == 1


def test_a_damaged_file_is_told_and_mended_by_putting_it_again(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    one, two = two_versions(store)
    path = tmp_path / "tasks" / "fish" / "versions" / f"{one}.safetensors"
    for damage in (b"", bundle(2).data, bundle(1).data[:-1], bundle(1).data[:-1] + b"\xff"):
        path.write_bytes(damage)
        with pytest.raises(CorruptBundle, match=f"expected a bundle with digest {one}"):
            store.get("fish", one)
        assert two in [info.version for info in store.versions("fish")]
    store.put(bundle(1))
    assert store.get("fish", one) == bundle(1)


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"live": 1}', '{"live": {"revision": 1, "history": [{}]}}', "[" * 99999]
)
def test_damaged_aliases_are_told(tmp_path: Path, damage: str) -> None:
    store = FileStore(tmp_path)
    one, _ = two_versions(store)
    (tmp_path / "tasks" / "fish" / "aliases.json").write_text(damage)
    with pytest.raises(CorruptAliases, match="expected stored aliases"):
        store.aliases("fish")
    with pytest.raises(CorruptAliases):
        store.set_alias("fish", "live", one)


def test_a_failing_disk_names_no_path(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "secret-place")
    store.put(bundle(1))
    (tmp_path / "secret-place" / "tasks" / "cat").write_text("a file where a folder belongs")
    with pytest.raises(StoreUnavailable) as caught:
        store.put(bundle(1, "cat"))
    assert "secret-place" not in str(caught.value)


def test_a_full_disk_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable) as caught:
        store.put(bundle(1))
    assert caught.value.code == "disk_full"
    monkeypatch.undo()
    consistent(tmp_path)
    assert store.tasks() == []
