# SPDX-License-Identifier: Apache-2.0
"""Holds the tt-forge-models loader, called as their test runner calls it, to one device's logits,
and its gradients to those through `meshwen.handoff.forward`.

    python tests/tt_harness/run.py          the 7B's geometry, and the demo model
    python tests/tt_harness/run.py --all    every size's geometry

It runs with the versions that their hardware is pinned to (`make test-tt`), with 64-bit types on,
on 1 to 32 simulated devices, and prints a table in Markdown. Exit status 1: a result is outside of
its bound.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import testers
from meshwen.handoff import forward, load_weights, parallel_model
from meshwen.runtime.jax_versions import enable_x64

# Query heads, key/value heads, tied embeddings: every size of Qwen2.5, narrow and with two layers.
# 1,003 words divide by no mesh.
GEOMETRIES = {
    "0.5B": (14, 2, True),
    "1.5B": (12, 2, True),
    "3B": (16, 2, True),
    "7B": (28, 4, False),
    "14B, 32B": (40, 8, False),
    "72B": (64, 8, False),
}
DEVICES = (1, 2, 4, 8, 32)
PCC = 0.99  # their bound
# Ours, for few layers: the largest difference, as part of the largest logit. In float32, sums in
# another order; in bfloat16 also inputs of matmuls that such sums round to a neighbour, 2^-8 away.
LARGEST = {"float32": 1e-5, "bfloat16": 2**-8}


def write_config(folder, geometry):
    queries, keys, tied = GEOMETRIES[geometry]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 1003,
        "hidden_size": 16 * queries,
        "intermediate_size": 592,
        "num_hidden_layers": 2,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def check(loaders, geometry, dtype, devices, **chosen):
    """Prints rows of the table, and yields whether each is within its bounds."""
    from tt_forge_models.config import Parallelism  # The loader's copy has brought it.

    def loader():
        return loaders.ModelLoader(variant=None, dtype=dtype, **chosen)

    expected = np.asarray(testers.OneDevice(loader()).infer())
    for count in devices:
        tester = testers.MultiChip(loader(), count, Parallelism.TENSOR_PARALLEL)
        found = np.asarray(tester.infer())
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        correlation = testers.pcc(found, expected)
        largest = np.abs(found - expected).max() / np.abs(expected).max()
        passed = correlation >= PCC and largest <= LARGEST[dtype]
        row = f"| {geometry} | {dtype} | {count} | {correlation:.9f} | {largest:.1e} |"
        print(row if passed else f"{row} FAILED", flush=True)
        yield passed


def check_training(loaders):
    """Yields whether folded gradients, on one device and on 8, are those through `forward`."""
    from tt_forge_models.config import Parallelism  # The loader's copy has brought it.

    def loader():
        return loaders.ModelLoader(checkpoint="demo", dtype="float32")

    one = testers.OneDevice(loader(), train=True)
    _, ((gradients,), _), cotangent = one.train()
    yield compare_gradients(one.model, gradients, testers.mesh_of(1), one.kwargs, cotangent)
    chips = testers.MultiChip(loader(), 8, Parallelism.TENSOR_PARALLEL)
    gradients = chips.gradients(cotangent)
    yield compare_gradients(chips.model, gradients, chips.mesh, one.kwargs, cotangent)


def compare_gradients(module, gradients, mesh, inputs, cotangent):
    """Prints the largest difference of any array, as part of its largest; whether it is small."""
    model = parallel_model(module.config, mesh, data_axes=(), dtype="float32")
    logits, ids = jax.jit(forward, static_argnums=0), jax.device_get(inputs["input_ids"])
    with enable_x64(False):  # jax 0.7.1 does not lower `forward` with 64-bit types on.
        params = load_weights(model, "demo")
        _, pullback = jax.vjp(lambda params: logits(model, params, ids), params)
        (expected,) = pullback(jax.device_get(cotangent))

    def difference(found, expected):
        found, expected = np.asarray(found), np.asarray(expected)
        return np.abs(found - expected).max() / np.abs(expected).max()

    found = module.folded(gradients)["params"]
    largest = max(jax.tree.leaves(jax.tree.map(difference, found, expected)))
    passed = largest <= LARGEST["float32"]
    row = f"Gradients, {mesh.size} devices: largest difference {largest:.1e}"
    print(row if passed else f"{row} FAILED", flush=True)
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every size's geometry")
    geometries = GEOMETRIES if parser.parse_args().all else ["7B"]
    # Before anything asks for devices, as their connector does.
    jax.config.update("jax_num_cpu_devices", 32)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    print(f"jax {jax.__version__}, 64-bit types on, {jax.device_count()} simulated devices\n")
    print("| geometry | dtype | devices | PCC | largest difference |\n|---|---|---|---|---|")
    passed = []
    with tempfile.TemporaryDirectory() as folder:
        loaders = testers.import_loader(folder)
        for geometry in geometries:
            config = write_config(Path(folder) / geometry, geometry)
            dummy = {"checkpoint": config, "load_format": "dummy"}
            for dtype in LARGEST:
                passed += check(loaders, geometry, dtype, DEVICES, **dummy)
        passed += check(loaders, "demo model", "float32", (8,), checkpoint="demo")
        print()
        passed += check_training(loaders)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
