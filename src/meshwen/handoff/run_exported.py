# SPDX-License-Identifier: Apache-2.0
"""Runs an exported program with plain JAX, and compares what it gives with the golden outputs.

    python run.py [FOLDER]

FOLDER is what `meshwen export --weights` wrote; without it, the one that this file is in. Needs
jax, and flatbuffers, with which jax reads programs. Runs on JAX's default back end.
Exit status: 0 the outputs agree; 1 they do not; 2 one line says why the folder cannot be run.
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
_NEEDED = (
    *("program.jax_export", "weights.safetensors"),
    *("golden_inputs.safetensors", "golden_outputs.safetensors"),
)
_DTYPES = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "I8": np.int8,
}


def main(arguments: list[str]) -> int:
    """Runs the program of a folder; returns the exit status."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if arguments[1:]:
        return failed(f"one folder is expected, not also {arguments[1]!r}")
    folder = Path(arguments[0]) if arguments else Path(__file__).parent
    try:
        return run(folder, read_manifest(folder))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        return failed(f"{folder} cannot be run: {type(error).__name__}: {reason}")


def run(folder: Path, manifest: Any) -> int:
    """Runs the program on the golden inputs, and compares."""
    mesh = Mesh(start_devices(manifest["mesh"]), [name for name, _ in manifest["mesh"]])
    exported = read_program(folder, manifest)
    arguments = place_arguments(folder, manifest, mesh)
    positional, _ = jax.tree.unflatten(exported.in_tree, arguments)
    step = jax.jit(
        exported.call,
        donate_argnums=manifest["donated"],
        compiler_options=manifest["compiler_options"] or None,
    )
    results = jax.tree.leaves(step(*positional))
    return compare(results, manifest, tensors(folder / "golden_outputs.safetensors"))


def read_manifest(folder: Path) -> Any:
    """The manifest, when every file is the one that it names."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        format, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder}/manifest.json: not an exported program ({error!r})")
    if format != FORMAT:
        fail(f"{folder}: format {format} of the manifest; this script reads format {FORMAT}")
    for name in _NEEDED:
        if name not in files:
            fail(f"{folder} has no {name}, and nothing to run: export it with --weights")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            fail(f"{path} is missing")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected["sha256"]:
            fail(f"{path} is not the file that was exported: its SHA-256 is {found}")
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
    unreadable = f"{path}: jax {jax.__version__} cannot read what jax {version} wrote"
    try:
        found = jax.export.deserialize(bytearray(path.read_bytes()))
    except ImportError:
        fail("jax reads programs with flatbuffers: pip install flatbuffers")
    except Exception as error:
        fail(f"{unreadable} ({str(error).partition('.')[0]})")
    if found.nr_devices != np.prod([size for _, size in manifest["mesh"]]):
        fail(unreadable)
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
    differences: dict[str, float | None] = {}
    for one, result in zip(manifest["results"], results, strict=True):
        kind, expected, found = one["name"].split(".")[0], golden[one["name"]], np.asarray(result)
        before = differences.setdefault(kind, None)
        if expected.shape != found.shape or expected.dtype != found.dtype:
            raise ValueError(f"{one['name']} is {found.dtype} {found.shape}, not as the golden one")
        if expected.tobytes() != found.tobytes():
            differences[kind] = np.maximum(before or 0.0, difference(expected, found))  # Keeps NaN.
    status = 0
    for kind, largest in differences.items():
        if largest is None:
            print(f"{kind}: the same bits")
            continue
        within = largest <= manifest["tolerance"]
        status = status if within else 1
        print(
            f"{kind}: differs by up to {largest:.2g} of its largest value, "
            f"{'within' if within else 'beyond'} {manifest['tolerance']:g}"
        )
    return status


def difference(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference in units of the largest expected value; of tokens, in tokens."""
    a, b = (x.astype(np.float64) for x in (expected, found))
    scale = 1.0 if np.issubdtype(expected.dtype, np.integer) else np.abs(a).max() or 1.0
    return float(np.abs(a - b).max() / scale)


def failed(message: str) -> int:
    """Says what is wrong; exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def fail(message: str) -> NoReturn:
    """Ends with it."""
    raise SystemExit(failed(message))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
