# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept between processes, in the user's cache folder."""

import os
import subprocess
import sys

SCRIPT = """
from meshwen.compilation_cache import enable_compilation_cache
enable_compilation_cache()
import jax
print(jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(4)).sum())
"""


def run(**environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "16.0\n"


def programs(folder) -> set[str]:
    """The programs in the cache, without the files in which JAX notes when one was used."""
    return {str(p) for p in folder.rglob("*") if p.is_file() and not p.name.endswith("-atime")}


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
