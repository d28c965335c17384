# SPDX-License-Identifier: Apache-2.0
"""Compiled programs, of which those used last are kept.

`jax.jit` keeps all that it has compiled for a function as long as the function lives. A program of
XLA's CPU back end takes hundreds of memory maps and tens of megabytes; a process may have 65,530
maps (Linux's `vm.max_map_count`). So each shape gets a function of its own here, and dropping that
function frees what was compiled for it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax

from meshwen.runtime.jax_settings import Jitted


class ProgramTable:
    """The programs that were used last. Any thread may use it.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._programs: OrderedDict[Hashable, Jitted] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, key: Hashable, make: Callable[[], Jitted]) -> Jitted:
        """The program of a key; `make` is called where none is kept.

        A program that is dropped while another thread runs it ends when that is done.
        """
        with self._lock:
            program = self._programs.pop(key, None) or make()
            self._programs[key] = program
            if len(self._programs) > self._limit:
                self._programs.popitem(last=False)
        return program


class ShapedProgram:
    """A function with a program of its own, kept in a table, for each shape of its arguments.

    Args:
        table: keeps the programs; several functions may share it.
        make: gives the function as a program, a new one at each call.
    """

    def __init__(self, table: ProgramTable, make: Callable[[], Jitted]):
        self._table, self._make = table, make

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """The function's result."""
        return self._program(arguments, static)(*arguments, **static)

    def lower(self, *arguments: Any, **static: Any) -> jax.stages.Lowered:
        """The function lowered for such arguments; see `jax.jit`."""
        return self._program(arguments, static).lower(*arguments, **static)

    def _program(self, arguments: tuple[Any, ...], static: dict[str, Any]) -> Jitted:
        # Not `self`, whose table would then be in a cycle with it, and free its programs late.
        key = (self._make, *map(_shape, arguments), *static.values())
        return self._table.get(key, self._make)


def _shape(argument: Any) -> Hashable:
    """Those of a named tuple's fields; of another pytree its first array's: others follow from it.

    Where they do not, one function has several programs, which are kept or dropped together.
    """
    if hasattr(argument, "shape"):
        return argument.shape
    if hasattr(argument, "_fields"):
        return tuple(map(_shape, argument))
    if isinstance(argument, dict | tuple) and argument:  # Not `leaves`: weights have hundreds.
        return _shape(next(iter(argument.values() if isinstance(argument, dict) else argument)))
    leaves = jax.tree.leaves(argument)
    return getattr(leaves[0], "shape", leaves[0]) if leaves else None
