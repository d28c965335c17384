# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept between processes, in the user's cache folder."""

import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from meshwen.runtime.compilation_cache import _own_folder, tidy

SCRIPT = """
from meshwen.runtime.compilation_cache import enable_compilation_cache
enable_compilation_cache()
import jax
print(jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(4)).sum())
"""


def run(**environment) -> str:
    """What a process says on stderr that compiles with a cache."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "16.0\n"
    return found.stderr


def programs(folder) -> set[str]:
    """The programs in the cache, without the files that say when one was used."""
    return {str(p) for p in folder.rglob("*") if p.is_file() and p.name.endswith("-cache")}


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    run(XDG_CACHE_HOME=str(tmp_path))
    kept = programs(tmp_path)
    assert kept == programs(tmp_path / "meshwen")
    assert kept
    run(XDG_CACHE_HOME=str(tmp_path))
    assert programs(tmp_path) == kept


def test_jaxs_own_setting_comes_first(tmp_path):
    chosen, home = tmp_path / "chosen", tmp_path / "home"
    run(JAX_COMPILATION_CACHE_DIR=str(chosen), HOME=str(home))
    assert programs(chosen)
    assert not home.exists()


def test_without_a_cache_folder_it_is_in_the_home(tmp_path):
    run(HOME=str(tmp_path))
    assert programs(tmp_path) == programs(tmp_path / ".cache" / "meshwen")
    assert programs(tmp_path)


def modes(folder) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_dir()}


def test_damaged_programs_are_replaced(tmp_path):
    run(XDG_CACHE_HOME=str(tmp_path))
    kept = sorted(programs(tmp_path))
    contents = {name: Path(name).read_bytes() for name in kept}
    for name, content in contents.items():
        # As after a kill or on a full disk; the last one is empty.
        Path(name).write_bytes(b"" if name == kept[-1] else content[: len(content) // 2])
    assert len(kept) >= 2
    assert "Error reading" not in run(XDG_CACHE_HOME=str(tmp_path))
    assert sorted(programs(tmp_path)) == kept
    assert all(zlib.decompress(Path(name).read_bytes()) for name in kept)


def test_the_folder_is_its_users_alone_whatever_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    before = os.umask(0)
    try:
        first = _own_folder()
    finally:
        os.umask(before)
    assert modes(tmp_path / "new") == {0o700}
    program = entry(Path(first), "program", 1, 1)
    for mode, kept in ((0o755, True), (0o777, False)):  # As earlier versions may have made it.
        os.chmod(first, mode)
        assert _own_folder() == first
        assert modes(tmp_path / "new") == {0o700}
        assert program.exists() == kept


@pytest.fixture
def homeless(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", no_home)


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _own_folder()
    monkeypatch.setattr("os.getuid", lambda: os.stat(tmp_path).st_uid + 1, raising=False)
    assert _own_folder() is None
    assert "it belongs to user" in caplog.text


def test_without_a_home_nothing_is_kept_and_a_line_says_so(homeless, caplog):
    assert _own_folder() is None
    (record,) = caplog.records
    assert "the home folder cannot be used (Could not determine home directory.)" in record.message


def test_a_file_in_the_folders_place_is_one_line_and_the_program_works(tmp_path):
    (tmp_path / "meshwen").write_text("")
    (line,) = run(XDG_CACHE_HOME=str(tmp_path)).splitlines()
    assert line.startswith("compiled programs are not kept for the next run: ")
    assert "File exists" in line


def entry(folder, name, size, used):
    path = folder / f"{name}-cache"
    path.write_bytes(zlib.compress(b"x") + bytes(size))
    path.with_name(f"{name}-atime").write_bytes(b"")
    os.utime(path, (used, used))
    return path


def test_the_least_recently_used_are_removed_beyond_the_limit(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(5000))
    old, new, newest = (entry(tmp_path, str(used), 1000, used) for used in (1, 3, 2))
    tidy(tmp_path, 2500)
    assert not old.exists()
    assert not (tmp_path / "1-atime").exists()
    assert new.exists()
    assert newest.exists()
    assert other.exists()


def test_a_file_is_read_again_only_after_a_change(tmp_path, monkeypatch):
    path = entry(tmp_path, "a", 10, 1)
    tidy(tmp_path)
    read = []
    monkeypatch.setattr(
        "meshwen.runtime.compilation_cache._is_whole", lambda path: read.append(path) or 1
    )
    os.utime(tmp_path / ".tidied")
    tidy(tmp_path)
    assert read == []
    path.write_bytes(b"")
    tidy(tmp_path)
    assert read == [path]
