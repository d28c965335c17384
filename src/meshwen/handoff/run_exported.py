# SPDX-License-Identifier: Apache-2.0
"""Runs an exported program with plain JAX, and compares what it gives with the golden outputs.

    python run.py [FOLDER]

FOLDER is what `meshwen export` wrote; without it, the one that this file is in. Needs jax and
nothing else. Exit status: 0 the outputs agree; 1 they do not; 2 the folder cannot be used.
"""

import hashlib
import json
import mmap
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.export
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FORMAT = 1
_DTYPES = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "I8": np.int8,
}


def main() -> int:
    """Runs the program of a folder; returns the exit status."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    manifest = read_manifest(folder)
    devices = start_devices(manifest["mesh"])
    mesh = Mesh(devices, [name for name, _ in manifest["mesh"]])
    exported = read_program(folder, manifest)
    arguments = place_arguments(folder, manifest, mesh)
    positional, _ = jax.tree.unflatten(exported.in_tree, arguments)
    run = jax.jit(
        exported.call,
        donate_argnums=manifest["donated"],
        compiler_options=manifest["compiler_options"] or None,
    )
    results = jax.tree.leaves(run(*positional))
    return compare(results, manifest, tensors(folder / "golden_outputs.safetensors"))


def read_manifest(folder: Path) -> Any:
    """The manifest, when every file is the one that it names."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        format, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder}/manifest.json: not an exported program ({error!r})")
    if format != FORMAT:
        fail(f"{folder}: format {format} of the manifest; this script reads format {FORMAT}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            fail(f"{path} is missing")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected["sha256"]:
            fail(f"{path} is not the file that was exported: its SHA-256 is {found}")
    if "weights.safetensors" not in files:
        fail(f"{folder} has no weights to run with: export again, with --weights")
    return manifest


def start_devices(axes: list[tuple[str, int]]) -> np.ndarray:
    """As many devices as the mesh has, in its shape; simulated ones on a CPU."""
    shape = [size for _, size in axes]
    count = int(np.prod(shape))
    if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        fail(f"the program is for {count} devices, and there are {len(devices)}")
    return np.array(devices[:count]).reshape(shape)


def read_program(folder: Path, manifest: Any) -> jax.export.Exported:
    """The program, of this version of JAX or of one that this can read."""
    path, version = folder / "program.jax_export", manifest["versions"]["jax"]
    if version != jax.__version__:
        print(f"note: exported with jax {version}, and this is {jax.__version__}", file=sys.stderr)
    try:
        found = jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:
        reason = str(error).partition(".")[0]
        fail(f"{path}: jax {jax.__version__} cannot read what jax {version} wrote ({reason})")
    if found.nr_devices != np.prod([size for _, size in manifest["mesh"]]):
        fail(f"{path}: jax {jax.__version__} cannot read what jax {version} wrote")
    return found


def place_arguments(folder: Path, manifest: Any, mesh: Mesh) -> list[jax.Array]:
    """The arguments, each split over the devices as its partition spec says."""
    stored = tensors(folder / "weights.safetensors") | tensors(folder / "golden_inputs.safetensors")
    placed = []
    for one in manifest["arguments"]:
        spec = PartitionSpec(*(tuple(axes) if axes else None for axes in one["spec"]))
        placed.append(jax.device_put(stored[one["name"]], NamedSharding(mesh, spec)))
    return placed


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file: a header of JSON, behind its length, and their bytes."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    found = {}
    for name, one in header.items():
        dtype, (start, stop) = np.dtype(_DTYPES[one["dtype"]]), one["data_offsets"]
        count = (stop - start) // dtype.itemsize
        found[name] = np.frombuffer(data, dtype, count, begin + start).reshape(one["shape"])
    return found


def compare(results: list[jax.Array], manifest: Any, golden: dict[str, np.ndarray]) -> int:
    """Prints how far each result is from the golden one; 1 where one is too far, else 0."""
    status = 0
    differences: dict[str, float] = {}
    for one, result in zip(manifest["results"], results, strict=True):
        expected, found = golden[one["name"]], np.asarray(result)
        kind = one["name"].split(".")[0]
        if expected.tobytes() == found.tobytes():
            differences.setdefault(kind, 0.0)
            continue
        a, b = (x.astype(np.float64) for x in (expected, found))
        scale = 1.0 if np.issubdtype(expected.dtype, np.integer) else np.abs(a).max() or 1.0
        difference = float(np.abs(a - b).max() / scale)
        difference = difference if difference > 0 else sys.float_info.min  # Another zero, or NaN.
        differences[kind] = max(differences.get(kind, 0.0), difference)
    for kind, difference in differences.items():
        if difference == 0:
            print(f"{kind}: the same bits")
            continue
        within = difference <= manifest["tolerance"]
        status = status if within else 1
        print(
            f"{kind}: differs by up to {difference:.2g} of its largest value, "
            f"{'within' if within else 'beyond'} {manifest['tolerance']:g}"
        )
    return status


def fail(message: str) -> NoReturn:
    """Says what is wrong, and ends with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
