"""The folder of kept programs: entries whole or not at all, bounded, trusted, and shared by processes."""

from __future__ import annotations

import logging
import os
import tarfile
import threading
import time
from pathlib import Path

import pytest

from vitcop_compile import ConfigError, InputError, store
from vitcop_compile.store import Store

MIB = 2**20


@pytest.fixture
def held(tmp_path) -> Store:
    return Store(tmp_path / "kept", 8 * MIB)


def put(held: Store, key: str, size: int = 100, group: str = "group", about: str = "x") -> None:
    folder = held.aside()
    (folder / "libraries").mkdir()
    (folder / "program").write_text(about)
    (folder / "libraries" / "a.so").write_bytes(b"\1" * size)
    held.put(group, key, folder, {"kind": about})


def used(held: Store, key: str, when: int) -> None:
    os.utime(held.root / "programs" / "group" / key / "entry.json", (when, when))


def test_what_was_put_is_found_whole(held):
    assert held.get("group", "a") is None and not held.knows("group") and not held.has("group", "a")
    put(held, "a")
    path = held.get("group", "a")
    assert path is not None and (path / "program").read_text() == "x" and (path / "libraries" / "a.so").stat().st_size == 100
    assert held.knows("group") and held.has("group", "a") and held.get("group", "b") is None and held.get("other", "a") is None
    assert not any((held.root / "aside").iterdir())


def _cut(path: Path) -> None:
    (path / "libraries" / "a.so").write_bytes(b"\1" * 99)


def _changed(path: Path) -> None:
    (path / "program").write_text("y")


def _added(path: Path) -> None:
    (path / "more.so").write_text("z")


def _lost(path: Path) -> None:
    (path / "program").unlink()


def _linked(path: Path) -> None:
    (path / "program").unlink()
    (path / "program").symlink_to("/etc/hostname")


def _unlisted(path: Path) -> None:
    (path / "entry.json").unlink()


def _nonsense(path: Path) -> None:
    (path / "entry.json").write_text("[1")


@pytest.mark.parametrize("harm", [_cut, _changed, _added, _lost, _linked, _unlisted, _nonsense])
def test_a_broken_entry_is_discarded_and_said(held, harm, caplog):
    put(held, "a")
    harm(held.root / "programs" / "group" / "a")
    with caplog.at_level(logging.WARNING, "vitcop_compile"):
        assert held.get("group", "a") is None
    assert "is discarded and made anew" in caplog.text
    assert not (held.root / "programs" / "group" / "a").exists()
    put(held, "a")
    assert held.get("group", "a") is not None


def test_the_oldest_go_beyond_the_bound(held):
    for when, key in enumerate("abc"):
        put(held, key, 2 * MIB)
        used(held, key, 1000 + when)
    assert held.get("group", "a") is not None  # used now
    put(held, "d", 3 * MIB)
    assert [key for key in "abcd" if held.has("group", key)] == ["a", "c", "d"]
    assert held.size() <= held.limit
    put(held, "e", 9 * MIB)  # larger than all of it: it is kept until the next
    assert [key for key in "abcde" if held.has("group", key)] == ["e"]


def test_files_of_other_compilers_count(held, monkeypatch):
    monkeypatch.setenv("VITCOP_CACHE", str(held.root))
    own = store.folder("openvino")
    assert own == held.root / "openvino" and own.is_dir()
    (own / "blob").write_bytes(b"\1" * 6 * MIB)
    os.utime(own / "blob", (1000, 1000))
    put(held, "a", 3 * MIB)
    assert held.has("group", "a") and not (own / "blob").exists()


def test_fillers_at_the_same_time_leave_one_entry(held):
    barrier = threading.Barrier(6)

    def run(number: int) -> None:
        barrier.wait()
        for _ in range(5):
            put(held, "same", about=str(number))
            assert held.get("group", "same") is not None

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held.get("group", "same") is not None and not any((held.root / "aside").iterdir())


def test_what_dead_processes_left_goes(held):
    old, new = held.aside(), held.aside()
    os.utime(old, (time.time() - 10 * 3600,) * 2)
    held.shrink()
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_written_is_read(held, monkeypatch, caplog):
    """Tests may run as root, whom no mode stops: the system's calls refuse instead."""
    put(held, "a")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for name in ("mkdir", "rename", "utime"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert held.get("group", "a") is not None
    monkeypatch.undo()
    folder = held.aside()
    monkeypatch.setattr(os, "rename", refuse)
    with caplog.at_level(logging.WARNING, "vitcop_compile"):
        held.put("group", "b", folder, {})
    assert "cannot be written (Permission denied): the program is not kept" in caplog.text
    assert not folder.exists() and held.get("group", "b") is None


def test_a_copy_elsewhere_is_as_good(held, tmp_path):
    put(held, "a")
    put(held, "b", group="other")
    held.aside()
    held.pack(tmp_path / "image.tar")
    (tmp_path / "there").mkdir(mode=0o700)
    with tarfile.open(tmp_path / "image.tar") as tar:
        assert not any(name.startswith("aside") for name in tar.getnames())
        tar.extractall(tmp_path / "there", filter="data")
    there = Store(tmp_path / "there", MIB)
    assert there.get("group", "a") is not None and there.get("other", "b") is not None
    with pytest.raises(InputError, match=r"image.tar cannot be written \(No such file or directory\): name a file in"):
        held.pack(tmp_path / "nowhere" / "image.tar")


@pytest.mark.parametrize("value", ["off", "OFF", "0", ""])
def test_off(monkeypatch, value):
    monkeypatch.setenv("VITCOP_CACHE", value)
    assert store.current() is None and store.folder("openvino") is None


def test_the_environment_says_where_and_how_much(monkeypatch, tmp_path):
    monkeypatch.setenv("VITCOP_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("VITCOP_CACHE_BYTES", "1000")
    found = store.current()
    assert found is not None and (found.root, found.limit) == (tmp_path / "own", 1000)
    with store.off():
        assert store.current() is None
    monkeypatch.delenv("VITCOP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.current().root == tmp_path / "xdg" / "vitcop_compile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.current().root == tmp_path / "home" / ".cache" / "vitcop_compile"


@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
def test_a_bound_that_is_none_is_refused(monkeypatch, tmp_path, value):
    monkeypatch.setenv("VITCOP_CACHE", str(tmp_path))
    monkeypatch.setenv("VITCOP_CACHE_BYTES", value)
    with pytest.raises(ConfigError, match=f"VITCOP_CACHE_BYTES='{value}' is not a number of bytes.*VITCOP_CACHE=off"):
        store.current()


def test_a_folder_is_made_for_its_user_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("VITCOP_CACHE", str(tmp_path / "deep" / "own"))
    before = os.umask(0)
    try:
        put(store.current(), "a")
    finally:
        os.umask(before)
    assert (tmp_path / "deep" / "own").stat().st_mode & 0o777 == 0o700
    assert store.current().get("group", "a") is not None


def test_without_a_home_nothing_is_kept(monkeypatch, caplog):
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("VITCOP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    assert store.current() is None and "name a folder in VITCOP_CACHE" in caplog.text


def test_a_folder_that_others_may_write_to_is_not_used(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("VITCOP_CACHE", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own").chmod(0o777)
    assert store.current() is None and "can be written by others (mode 777): chmod go-w it" in caplog.text
    (tmp_path / "own").chmod(0o755)
    assert store.current() is not None
    about = os.stat(tmp_path / "own")
    other = os.stat_result((about.st_mode, *about[1:4], os.getuid() + 1, *about[5:]))
    monkeypatch.setattr(Path, "stat", lambda self, **_: other)
    assert store.current() is None and f"belongs to user {os.getuid() + 1}" in caplog.text
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITCOP_CACHE", str(tmp_path / "file"))
    assert store.current() is None and "is not a folder" in caplog.text
