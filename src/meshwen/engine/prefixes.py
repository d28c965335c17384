# SPDX-License-Identifier: Apache-2.0
"""Prefixes of an engine's KV cache, saved to files and loaded from them."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from meshwen.cache.block_pool import NULL_BLOCK
from meshwen.cache.budget import KVCachePlan
from meshwen.checkpoints.writing import check_new_file
from meshwen.common.json_files import shown, to_json
from meshwen.engine.core import EngineCore
from meshwen.engine.prefix_blocks import PrefixBlocks
from meshwen.engine.prefix_file import Prefix, read_prefix, write_prefix
from meshwen.engine.request import Request
from meshwen.engine.runner import ModelRunner
from meshwen.errors import MeshwenError
from meshwen.ops.numerics.exact import Exact
from meshwen.weights.saving import held_sha256

# Of a config, what has no part in keys and values.
_NO_PART = ("torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")


class Prefixes:
    """Moves prefixes between the KV cache and files.

    `find` and `put` are for the thread that has the engine to itself.

    Args:
        core: the engine's.
        plan: how many KV blocks there are.
    """

    def __init__(self, core: EngineCore, plan: KVCachePlan):
        self._core, self._plan = core, plan

    def check(self, what: str) -> None:
        """Refuses to save or load where that is of no use or cannot be done.

        Args:
            what: "save" or "load".

        Raises:
            MeshwenError: prefix caching is off, or the mesh spans several processes.
        """
        if not self._core.blocks.prefix_caching:
            raise MeshwenError(
                f"cannot {what} a prefix without prefix caching: load the model with "
                "prefix_caching=True"
            )
        if self._core.runner.plan.mesh.is_multi_process:
            raise MeshwenError(
                f"cannot {what} a prefix where each process holds a part of the KV cache: load the "
                "model in one process"
            )

    def check_new(self, path: Path, request: Request, *, overwrite: bool) -> None:
        """Refuses what cannot be saved, before it is computed.

        Raises:
            MeshwenError: the prompt fills no block, its salt is no Unicode, or the file may not be
                written.
        """
        length, size = len(request.prompt_tokens), self._plan.block_size
        if length < size:
            raise MeshwenError(
                f"a prefix is saved in whole KV blocks, and the prompt of {length} tokens fills "
                f"none of {size}: give a longer one"
            )
        if any("\ud800" <= character <= "\udfff" for character in request.cache_salt):
            raise MeshwenError(
                f"cache_salt must be valid Unicode to be saved, not {shown(request.cache_salt)}"
            )
        check_new_file(path, overwrite=overwrite)

    def find(self, request: Request) -> Prefix | None:
        """What the cache holds of a prompt, in whole blocks; None where some have none there."""
        blocks = self._core.blocks
        part, table = blocks.find(request.prompt_tokens, request.salt)
        if len(table) < len(request.prompt_tokens) // blocks.block_size:
            return None
        ids = np.array(request.prompt_tokens[: len(table) * blocks.block_size], np.int32)
        runner = self._core.runner
        prefix = Prefix.empty(ids, runner.config, runner.dtype, request.cache_salt)
        self._blocks.read(self._core.cache, part, table, prefix)
        return prefix

    def write(self, path: Path, prefix: Prefix, *, overwrite: bool) -> None:
        """Writes a file: see `write_prefix`."""
        write_prefix(path, prefix, self._made_by, overwrite=overwrite)

    def read(self, path: Path) -> Prefix:
        """What a file holds, in whole blocks: see `read_prefix`.

        Raises:
            MeshwenError: the file is refused, or fills no block.
        """
        runner, size = self._core.runner, self._plan.block_size
        most = self._plan.longest - 1
        prefix = read_prefix(path, runner.config, runner.dtype, self._made_by, most)
        length = len(prefix.token_ids) // size * size
        if not length:
            raise MeshwenError(
                f"{path} has a prefix of {len(prefix.token_ids)} tokens, which fills no KV block "
                f"of {size}"
            )
        keys, values = prefix.keys[:, :length], prefix.values[:, :length]
        return Prefix(prefix.token_ids[:length], keys, values, prefix.cache_salt)

    def check_room(self, prefix: Prefix) -> None:
        """Refuses a prefix for which a part of the batch that lacks it has no blocks left.

        Raises:
            MeshwenError: saying how many there are.
        """
        needed = len(prefix.token_ids) // self._plan.block_size
        free = min(map(self._core.blocks.free_blocks, self._lacking(prefix)), default=needed)
        if needed > free:
            raise MeshwenError(
                f"the prefix needs {needed} KV blocks, of which {free} are free: wait until "
                "requests have ended, or raise kv_cache_memory"
            )

    def put(self, prefix: Prefix) -> None:
        """Puts a prefix into the cache of every part of the batch that lacks it, for requests.

        There must be room. What raises in here has taken the cache with it: call
        `EngineCore.clear`.
        """
        blocks, tokens = self._core.blocks, prefix.token_ids.tolist()
        numbers = {part: -1 - part for part in self._lacking(prefix)}  # No sequence has them.
        if not numbers:
            return
        for part, number in numbers.items():
            placed = blocks.begin(number, tokens, prefix.salt, use_cached=False, parts={part: 0})
            assert placed is not None, "there is no room"
        nothing = [NULL_BLOCK] * (len(tokens) // self._plan.block_size)
        tables = [
            blocks.table(numbers[part]) if part in numbers else nothing
            for part in range(self._plan.parts)
        ]
        self._core.cache = self._blocks.written(self._core.cache, tables, prefix)
        for number in numbers.values():
            blocks.computed(number, tokens, len(tokens))
            blocks.free(number)

    def _lacking(self, prefix: Prefix) -> list[int]:
        """The parts of the batch that have not all of a prefix in the cache."""
        found = self._core.blocks.find_all(prefix.token_ids.tolist(), prefix.salt)
        needed = len(prefix.token_ids) // self._plan.block_size
        return [part for part, blocks in enumerate(found) if len(blocks) < needed]

    @cached_property
    def _blocks(self) -> PrefixBlocks:
        return PrefixBlocks(self._core.runner)

    @cached_property
    def _made_by(self) -> dict[str, str]:
        """Reads all weights, once."""
        return made_by(self._core.runner)


def made_by(runner: ModelRunner) -> dict[str, str]:
    """What decides a prefix's keys and values, by name: the same on every mesh.

    In exact numerics whatever decides bits. In fast numerics they differ by rounding from mesh to
    mesh anyway, so there the model alone.
    """
    model = runner.model
    config = {name: v for name, v in runner.config.to_dict().items() if name not in _NO_PART}
    found = {
        "config_sha256": hashlib.sha256(to_json(config, sort_keys=True).encode()).hexdigest(),
        "numerics": model.numerics,
        "dtype": str(runner.dtype),
        "quantization": model.quantization or "none",
    }
    if model.numerics == "exact":
        platform = runner.plan.mesh.devices.flat[0].platform
        found |= {
            "exact_version": str(Exact.version),
            "matmuls_by": f"{model.matmuls_by} on {platform}",
            "jax": jax.__version__,
        }
    # The last, as whatever else differs makes other weights too.
    return found | {"weights_sha256": held_sha256(runner.params, model.weights)}
