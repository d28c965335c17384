# SPDX-License-Identifier: Apache-2.0
"""What tt-xla's test runner does with a JAX loader, call by call, with CPUs for its devices.

Two testers: one device (with gradients, too), and one mesh axis. Their keyword arguments, and what
is left out of a call, are those of tt-xla 95c1c1c (`tests/runner/testers/jax/`).
"""

import importlib.util
import inspect
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from flax import linen
from jax.sharding import NamedSharding, PartitionSpec

HERE = Path(__file__).parent
LOADERS = HERE.parents[1] / "integrations" / "tt_forge_models"
LOADER = "qwen_2_5/causal_lm/jax/loader.py"
AXIS = "X"


def import_loader(folder):
    """The loader's module, copied into a repository of theirs, as their runner imports it."""
    root = Path(folder) / "tt_forge_models"
    shutil.copytree(HERE / "tt_forge_models", root)
    shutil.copytree(LOADERS, root, dirs_exist_ok=True)
    sys.path.insert(0, str(root.parent))
    package = "tt_forge_models." + str(Path(LOADER).parent).replace("/", ".")
    spec = importlib.util.spec_from_file_location(f"{package}.loader", root / LOADER)
    module = importlib.util.module_from_spec(spec)
    module.__package__ = package
    sys.modules["tt-forge-models.qwen_2_5.causal_lm.jax.loader"] = module
    spec.loader.exec_module(module)
    return module


def mesh_of(devices):
    return jax.make_mesh((devices,), (AXIS,), devices=jax.devices("cpu"))


class OneDevice:
    """Their tester of one device: `apply`, jitted, with what the loader gives for it."""

    def __init__(self, loader, train=False):
        self.model, train_keyword = loader.load_model(), {"train": train}
        loader.load_inputs()
        loader.get_input_parameters(**train_keyword)
        self.args = loader.get_forward_method_args()
        self.kwargs = loader.get_forward_method_kwargs(**train_keyword)
        self.static = loader.get_static_argnames()
        self.executable = getattr(self.model, loader.get_forward_method_name())
        assert isinstance(self.model, linen.Module)

    def infer(self):
        self.put(self.executable, self.args)
        return jax.jit(self.executable, static_argnames=self.static)(*self.args, **self.kwargs)

    def train(self):
        """Logits, gradients by every argument that is not static, and the logits' cotangent."""
        static = {name: self.kwargs[name] for name in self.static}
        kwargs = {k: value for k, value in self.kwargs.items() if k not in self.static}
        partial = jax.tree_util.Partial(self.executable, **static)
        self.put(partial, self.args)
        compiled = jax.jit(partial, static_argnames=[])
        logits, pullback = jax.vjp(
            lambda args, kwargs: compiled(*args, **kwargs), self.args, kwargs
        )
        # Theirs are uniform in [0, 1), and so here.
        cotangent = jax.random.uniform(jax.random.PRNGKey(0), logits.shape, logits.dtype)
        return logits, pullback(cotangent), cotangent

    @staticmethod
    def put(executable, args):
        """They look up the parameter of each positional argument."""
        names = list(inspect.signature(executable).parameters)
        for number, arg in enumerate(args):
            assert names[number]
            jax.device_put(arg, jax.devices("cpu")[0])


class MultiChip:
    """Their tester of a mesh axis: `jit(shard_map(model.apply))` with a replicated result."""

    def __init__(self, loader, devices, parallelism):
        mesh = mesh_of(devices)
        model = loader.load_multichip_model(axis_name=AXIS, num_devices=devices, train_mode=False)
        inputs = loader.load_inputs(mesh=mesh)
        input_specs = loader.get_input_activations_partition_spec(
            mesh, axis_name=AXIS, parallelism=parallelism
        )
        specs = loader.load_parameters_partition_spec(
            model_for_multichip=model,
            cpu_mesh=mesh,
            input_activations_partition_specs=input_specs,
            inputs=inputs,
            parallelism=parallelism,
        )
        parameters = loader.load_parameters(
            train=False,
            inputs=inputs,
            model_for_multichip=model,
            cpu_mesh=mesh,
            input_activations_partition_specs=input_specs,
            input_parameters_partition_specs=specs,
        )
        assert isinstance(model, linen.Module)
        self.mesh, self.model = mesh, model
        self.args, self.in_specs = [parameters, inputs], (specs, *input_specs)

    def compiled(self):
        from jax.experimental.shard_map import shard_map  # Not in every jax that tests run with.

        mapped = shard_map(
            self.model.apply,
            mesh=self.mesh,
            in_specs=self.in_specs,
            out_specs=PartitionSpec(),
            check_rep=False,
        )
        return jax.jit(
            mapped,
            out_shardings=NamedSharding(self.mesh, PartitionSpec()),
            static_argnames=[],
            compiler_options={},
        )

    def infer(self):
        args = [self.put(*pair) for pair in zip(self.args, self.in_specs, strict=True)]
        return self.compiled()(*args)

    def gradients(self, cotangent):
        """By the weights, with the logits' cotangent. Theirs has no training on a mesh."""
        variables, inputs = (self.put(*pair) for pair in zip(self.args, self.in_specs, strict=True))
        compiled = self.compiled()
        _, pullback = jax.vjp(
            lambda params: compiled({**variables, "params": params}, inputs), variables["params"]
        )
        return {"params": pullback(cotangent)[0]}

    def put(self, arg, spec):
        """Each array by its spec; scalars are copied."""

        def placed(spec, array):
            whole = PartitionSpec() if getattr(array, "ndim", None) == 0 else spec
            return jax.device_put(array, NamedSharding(self.mesh, whole))

        def is_leaf(node):
            return isinstance(node, linen.Partitioned | PartitionSpec)

        if isinstance(arg, jax.Array):
            return placed(spec, arg)
        return jax.tree.map(placed, spec, arg, is_leaf=is_leaf)


def pcc(found, expected):
    """Pearson's correlation in float64, as theirs, but without 1.0 for what is merely close."""
    x, y = (np.asarray(array, np.float64).ravel() for array in (found, expected))
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
