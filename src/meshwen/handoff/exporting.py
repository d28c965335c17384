# SPDX-License-Identifier: Apache-2.0
"""An exported program: a folder that runs with plain JAX.

    manifest.json                 versions, mesh, arguments, results, donation, compiler options
    program.jax_export            the program, for `jax.export.deserialize`
    program.stablehlo.mlir        the same as text
    golden_inputs.safetensors     the arguments of one step, without the weights
    golden_outputs.safetensors    what it gave
    weights.safetensors           the weights as they lie on the devices, where they are asked for
    run.py                        runs the program, and compares what it gives

`docs/hardware.md` describes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from meshwen.checkpoints.safetensors import write_safetensors
from meshwen.common.extras import how_to_install
from meshwen.common.paths import exists, user_path
from meshwen.errors import MeshwenError
from meshwen.handoff import run_exported
from meshwen.handoff.golden import golden_step
from meshwen.handoff.plain import Plain, check_params, names
from meshwen.handoff.programs import Program
from meshwen.weights.source import Index, TensorSource

# How far outputs may be from the golden ones, in units of their largest value, where another
# compiler or another device computes them.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


def export(
    exported: Program,
    folder: str | os.PathLike[str],
    params: Plain | None = None,
    *,
    weights: bool = False,
    platform: str | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Path:
    """Writes a program, and the arguments and results of one step of it, to a new folder.

    Args:
        exported: the program.
        folder: is made; it appears when everything is in it.
        params: plain weights on the program's mesh; None: no step is run, and there are no golden
            files. A mesh without devices has none.
        weights: whether to write the weights.
        platform: what the program is lowered for; None: the mesh's devices, or "cpu".
        progress: is told what is done next.

    Returns:
        The folder's path.

    Raises:
        MeshwenError: the folder exists or cannot be written, or there are no weights to write.
    """
    target = check_folder(folder)
    if weights and params is None:
        raise MeshwenError("there are no weights to write: give params, or leave the weights out")
    if params is not None and not isinstance(exported.mesh, Mesh):
        raise MeshwenError("a mesh without devices runs no step: leave params out")
    if params is not None:
        check_params(params, exported.model.weights)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            made = Path(name) / target.name
            made.mkdir()
            _write(exported, made, params, weights, platform, progress)
            made.rename(target)
    except OSError as error:  # Such as a full disk.
        raise MeshwenError(f"cannot write {target}: {error.strerror}") from None
    return target


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder that can be written. To be called before anything takes its time.

    Raises:
        MeshwenError: it exists; or what `jax.export` writes files with is not installed.
    """
    target = user_path(folder)
    if exists(target):
        raise MeshwenError(f"{target} exists: name a folder that does not, or remove it")
    if find_spec("flatbuffers") is None:
        raise MeshwenError(f"exporting needs flatbuffers: {how_to_install('export')}")
    return target


def _write(
    exported: Program,
    folder: Path,
    params: Plain | None,
    weights: bool,
    platform: str | None,
    progress: Callable[[str], None],
) -> None:
    progress("lowering the program")
    artefact = exported.exported(platform)
    (folder / "program.jax_export").write_bytes(artefact.serialize())
    (folder / "program.stablehlo.mlir").write_text(artefact.mlir_module())
    if params is not None:
        progress("running one step")
        inputs, outputs = golden_step(exported, params)
        _save(inputs, folder / "golden_inputs.safetensors")
        _save(outputs, folder / "golden_outputs.safetensors")
        if weights:
            progress("writing the weights")
            _save({"params": params}, folder / "weights.safetensors")
    source = Path(run_exported.__file__)
    (folder / "run.py").write_bytes(source.read_bytes())
    files = sorted(path for path in folder.iterdir())
    manifest = _manifest(exported, artefact) | {"files": {f.name: described_file(f) for f in files}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _manifest(exported: Program, artefact: jax.export.Exported) -> dict[str, Any]:
    """What one has to know to run the program."""
    model, sizes = exported.model, exported.sizes
    shapes = exported.mesh.shape
    return {
        "format": run_exported.FORMAT,
        "program": exported.name,
        "profile": exported.profile,
        "versions": {name: metadata.version(name) for name in ("meshwen", "jax", "jaxlib")},
        "platforms": list(artefact.platforms),
        "model": model.config.name,
        "vocab_size": model.config.vocab_size,
        "dtype": model.dtype.name,
        "numerics": model.numerics,
        "quantization": model.quantization,
        "mesh": [[name, shapes[name]] for name in exported.mesh.axis_names],
        "sizes": {"batch": sizes.batch, "tokens": sizes.tokens, "length": sizes.length},
        "arguments": _described(exported.arguments),
        "results": _described(exported.results),
        "donated": list(exported.donated),
        "compiler_options": exported.compiler_options,
        "tolerance": _TOLERANCES[model.dtype.name],
    }


def _described(arrays: Mapping[str, Plain]) -> list[dict[str, Any]]:
    """Name, shape, dtype and partition spec of each array, in the program's order."""
    return [
        {
            "name": name,
            "shape": list(one.shape),
            "dtype": one.dtype.name,
            "spec": [[axes] if isinstance(axes, str) else axes and list(axes) for axes in spec],
        }
        for argument, shapes in arrays.items()
        for name, one in names(shapes, argument)
        for spec in [one.sharding.spec]
    ]


def _save(arrays: Mapping[str, Plain], path: Path) -> None:
    """Arrays as a safetensors file, under the names that the manifest has for them."""
    found = [pair for argument, plain in arrays.items() for pair in names(plain, argument)]
    write_safetensors(path, [_Placed.of(name, array) for name, array in found])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Placed(TensorSource):
    """An array as it lies on the devices, copies and padding included."""

    array: jax.Array | np.ndarray

    @classmethod
    def of(cls, name: str, array: jax.Array | np.ndarray) -> Self:
        """The array under a name."""
        dtype = np.dtype(array.dtype)
        return cls(name=name, shape=array.shape, dtype=dtype, nbytes=array.nbytes, array=array)

    def read(self, index: Index = ()) -> np.ndarray:
        """The array, on the host."""
        return np.asarray(self.array)[index]


def described_file(path: Path) -> dict[str, Any]:
    """What the manifest has of a file."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
