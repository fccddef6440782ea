"""Arrays kept on disk: the right ones or none, never more than the bound, whoever writes and whoever dies."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from server.training.caches import array_cache, array_file
from server.training.caches.array_cache import ArrayCache
from server.training.caches.array_file import DamagedError
from server.training.caches.feature_cache import FeatureCache, FeatureKey, to_array, to_tensor
from tests.training.kept_arrays import KEYS, files, held, made, noted

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(7,), (0, 5), (3, 4), (2, 3, 4, 5)])
def test_what_is_kept_comes_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 99, shape).astype(dtype)
    cache = ArrayCache(tmp_path, 2**20, spread=False)
    assert cache.get("ab") is None
    cache.put("ab", array)
    found = ArrayCache(tmp_path, 2**20, spread=False).get("ab")
    assert found is not None
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_a_large_array_is_mapped_and_writing_to_it_changes_nobody_elses(tmp_path: Path) -> None:
    cache, array = ArrayCache(tmp_path, 2**26, spread=False), np.ones((2**10, 2**11), np.float32)
    cache.put("ab", array[:, ::2])  # 4 MiB, and not contiguous
    mine = cache.get("ab")
    assert mine is not None
    mine += 1
    other = cache.get("ab")
    assert other is not None
    np.testing.assert_array_equal(other, array[:, ::2])


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros(3, np.int64), np.zeros((1,) * 5, np.uint8), np.uint8(1)])
def test_other_kinds_of_arrays_are_a_mistake(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(TypeError, match="expected"):
        ArrayCache(tmp_path, 2**20, spread=False).put("ab", np.asarray(array))
    assert not files(tmp_path)


def test_any_damage_is_noticed_and_the_file_removed(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 2**20, spread=False)
    cache.put("ab", made("ab", 100))
    path = files(tmp_path)["ab"]
    whole = path.read_bytes()
    damaged = [whole[:cut] for cut in range(len(whole))] + [whole + b"\0", bytes(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(len(whole))]
    for content in damaged:
        path.write_bytes(content)
        assert cache.get("ab") is None
        assert not path.exists()
    cache.put("ab", made("ab", 100))
    assert path.read_bytes() == whole


def test_a_file_under_another_key_is_not_taken_for_it(tmp_path: Path) -> None:
    array_file.write(tmp_path / "ab", "ab", made("ab"))
    os.replace(tmp_path / "ab", tmp_path / "cd")
    with pytest.raises(DamagedError):
        array_file.read(tmp_path / "cd", "cd")


@pytest.mark.parametrize("spread", [True, False])
def test_the_bound_holds_at_every_moment(tmp_path: Path, spread: bool) -> None:
    bound = 16 * 4 * 4096
    cache = ArrayCache(tmp_path, bound, spread=spread)
    for key in KEYS:
        cache.put(key, made(key))
        assert held(tmp_path) <= noted(tmp_path) <= bound
        found = cache.get(key)
        assert found is not None
        np.testing.assert_array_equal(found, made(key))
    assert held(tmp_path) > bound / 2


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 8 * 4096, spread=False)
    for age, key in enumerate(KEYS[:8]):
        cache.put(key, made(key))
        os.utime(files(tmp_path)[key], (age, age))
    assert cache.get(KEYS[0]) is not None
    cache.put(KEYS[8], made(KEYS[8]))
    gone = set(KEYS[:9]) - set(files(tmp_path))
    assert gone == set(KEYS[1:3])  # room for the new one, and an eighth to spare


def test_what_is_there_already_is_neither_written_nor_counted_again(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 8 * 4096, spread=False)
    cache.put("ab", made("ab"))
    before = files(tmp_path)["ab"].stat()
    for _ in range(20):
        cache.put("ab", made("ab"))
    after = files(tmp_path)["ab"].stat()
    assert (after.st_ino, after.st_mtime_ns, noted(tmp_path)) == (before.st_ino, before.st_mtime_ns, 4096)


def test_what_a_dead_writer_left_is_gone_when_the_cache_is_opened(tmp_path: Path) -> None:
    ArrayCache(tmp_path, 8 * 4096, spread=False).put("ab", made("ab"))
    (files(tmp_path)["ab"].parent / "new").write_bytes(bytes(5000))
    ArrayCache(tmp_path, 8 * 4096, spread=False)
    assert set(files(tmp_path)) == {"ab"}
    assert noted(tmp_path) == held(tmp_path) == 4096


def test_what_is_larger_than_the_cache_is_not_kept_and_evicts_nothing(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 8 * 4096, spread=False)
    cache.put("ab", made("ab"))
    cache.put("cd", made("cd", 9 * 4096))
    assert cache.get("cd") is None
    assert cache.get("ab") is not None


def test_a_lowered_bound_is_met_when_the_cache_is_opened(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path, 2**20, spread=True)
    for key in KEYS:
        cache.put(key, made(key))
    ArrayCache(tmp_path, 2**18, spread=True)
    assert 0 < held(tmp_path) <= 2**18
    none = ArrayCache(tmp_path, 0, spread=True)
    none.put(KEYS[0], made(KEYS[0]))
    assert held(tmp_path) == 0
    assert none.get(KEYS[0]) is None


def test_a_folder_that_cannot_be_used_costs_the_cache_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = ArrayCache(tmp_path / "file", 2**20, spread=True)
    for key in KEYS[:5]:
        cache.put(key, made(key))
        assert cache.get(key) is None
    assert [record.getMessage() for record in caplog.records] == ["the cache file cannot be used: Not a directory"]


def test_the_last_of_the_disk_is_left_to_what_cannot_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ArrayCache(tmp_path, 2**20, spread=False)
    cache.put("ab", made("ab"))
    disk = os.statvfs(tmp_path)
    monkeypatch.setattr(array_cache, "RESERVE_BYTES", disk.f_bavail * disk.f_frsize + 2**30)
    cache.put("cd", made("cd"))
    assert set(files(tmp_path)) == {"ab"}
    assert cache.get("ab") is not None
    assert "of its disk are free" in caplog.text


def test_a_disk_that_is_full_leaves_no_half_file(tmp_path: Path) -> None:
    """A real limit of the kernel on what a process may write into one file."""
    script = """
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    cache = ArrayCache(Path(sys.argv[1]), 2**20, spread=False)
    cache.put("ab", made("ab", 20_000))
    assert cache.get("ab") is None
    assert not files(Path(sys.argv[1]))
    cache.put("cd", made("cd"))
    assert cache.get("cd") is not None
    """
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stderr
    assert set(files(tmp_path)) == {"cd"}


# --- several processes ------------------------------------------------------------------------------------------------

PRELUDE = """
import os, random, signal, sys
from pathlib import Path
import numpy as np
from server.training.caches import array_cache
from server.training.caches.array_cache import ArrayCache
from tests.training.kept_arrays import KEYS, files, held, made, noted
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    process = start(script, *arguments)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


WORK = """
folder, bound, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cache, choose, hits = ArrayCache(folder, bound, spread=True), random.Random(seed), 0
for _ in range(1500):
    key = choose.choice(KEYS[:120])
    found = cache.get(key)
    hits += found is not None
    assert found is None or (found == made(key)).all()
    if found is None:
        cache.put(key, made(key))
print(hits)
"""


def test_processes_share_the_folder_and_its_bound(tmp_path: Path) -> None:
    bound = 16 * 5 * 4096  # 80 of 120
    workers = [start(WORK, tmp_path, bound, seed) for seed in range(3)]
    while any(worker.poll() is None for worker in workers):
        assert held(tmp_path) <= bound + 3 * 4096  # a file may be renamed while it is being counted
    for worker in workers:
        out, err = worker.communicate()
        assert worker.returncode == 0, err
        assert int(out) > 100
        assert not err  # nobody met half a file
    assert held(tmp_path) <= noted(tmp_path) <= bound
    assert "new" not in files(tmp_path)


def test_a_writer_killed_anywhere_leaves_nothing_wrong(tmp_path: Path) -> None:
    """Killed before every call that touches the disk, and halfway through every file."""
    script = """
    def dying(step):
        left = step
        def dies(call):
            def wrapped(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args, **kwargs)
            return wrapped
        def half(path, key, array, whole=array_cache.write):
            whole(path, key, array)
            os.truncate(path, os.path.getsize(path) // 2)
            cut(path)
            whole(path, key, array)
        cut = dies(lambda path: None)
        array_cache.write = half
        for name in ("open", "pwrite", "replace", "unlink", "mkdir", "scandir"):
            setattr(os, name, dies(getattr(os, name)))

    def changes(folder):
        cache = ArrayCache(folder, 6 * 4096, spread=False)
        for key in KEYS[:9]:
            cache.put(key, made(key))

    step = 0
    while True:
        folder = Path(sys.argv[1], str(step))
        witness = ArrayCache(folder, 6 * 4096, spread=False)
        pid = os.fork()
        if pid == 0:
            dying(step)
            changes(folder)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert held(folder) <= 6 * 4096, step
        assert noted(folder) >= held(folder), step
        for key in KEYS[:9]:
            found = witness.get(key)
            assert found is None or (found == made(key)).all(), step
        for key in KEYS[9:30]:  # whoever was there before goes on, and keeps to the bound
            witness.put(key, made(key))
            assert held(folder) <= 6 * 4096, step
            assert (witness.get(key) == made(key)).all(), step
        assert not set(files(folder)) - set(KEYS), step
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        step += 1
    print(step)
    """
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def test_writers_killed_at_random_leave_nothing_wrong(tmp_path: Path) -> None:
    forever = WORK.replace("range(1500)", "iter(int, 1)")
    bound = 16 * 5 * 4096
    for seed in range(3):
        doomed = start(f"print('ready', flush=True){forever}", tmp_path, bound, seed)
        assert doomed.stdout is not None
        doomed.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            doomed.wait(random.Random(seed).uniform(0.05, 0.3))
        doomed.kill()
        doomed.communicate()
        cache = ArrayCache(tmp_path, bound, spread=True)
        assert held(tmp_path) <= noted(tmp_path) <= bound
        assert "new" not in files(tmp_path)
        assert all(found is None or (found == made(key)).all() for key in KEYS for found in [cache.get(key)])


# --- features ---------------------------------------------------------------------------------------------------------

KEY = FeatureKey("images", "backbone", "cpu", "float32", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_features_are_found_under_everything_that_they_depend_on(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((50, 192), np.float32)
    FeatureCache(tmp_path, 2**20).put(KEY, features)
    cache = FeatureCache(tmp_path, 2**20)
    found = cache.get(replace(KEY))
    assert found is not None
    np.testing.assert_array_equal(found, features)
    others = {"images": "x", "backbone": "x", "device": "cuda", "dtype": "bfloat16", "what": "tokens@3"}
    for name, value in {**others, "mean": (0.4, 0.5, 0.5), "std": (0.4, 0.5, 0.5)}.items():
        assert cache.get(replace(KEY, **{name: value})) is None, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    cache = FeatureCache(tmp_path, 2**20)
    cache.put(KEY, to_array(tensor))
    found = cache.get(KEY)
    assert found is not None
    assert to_tensor(found).dtype == dtype
    assert torch.equal(to_tensor(found), tensor)
