# SPDX-License-Identifier: Apache-2.0
"""A model as a Flax linen module, to apply on one device or on each device of a mesh axis.

    module = FlaxQwen25ForCausalLM.for_model("demo", axis_name="X", num_devices=8)
    variables = module.load_parameters("demo", mesh)
    specs = (module.partition_specs(), P())
    apply = jax.shard_map(module.apply, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    logits = jax.jit(apply)(variables, input_ids)

It computes the program `logits` of `meshwen.handoff`, in the portable profile. The extra `flax` has
what it needs.
"""

from __future__ import annotations

import zlib
from functools import lru_cache, partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32, Int

from meshwen.checkpoints import open_checkpoint
from meshwen.common.arguments import brief, whole_number
from meshwen.engine.options import dtype_name
from meshwen.errors import MeshwenError
from meshwen.handoff.plain import Plain, params_specs
from meshwen.handoff.programs import parallel_model, program
from meshwen.handoff.training import folded
from meshwen.handoff.weights import load_weights
from meshwen.models.config import ModelConfig
from meshwen.models.parallel_model import ParallelModel
from meshwen.runtime.jax_settings import own_settings_in_trace
from meshwen.weights.declaration import unflatten
from meshwen.weights.layout import WeightLayout
from meshwen.weights.loading import dummy_values


class FlaxCausalLM(linen.Module):
    """Logits of whole sequences: `module.apply(variables, input_ids)`.

    Its variables are `params`, weights named as in the checkpoint and laid out for `num_devices`,
    and, for several devices, `constants`: `device`, int32 [n], the numbers 0 to n - 1, of which
    each device gets its own. Without the constants a device asks XLA for its number.

    Under `shard_map`, `apply` takes each device's part of the variables. Outside of it, it takes
    the whole ones, and computes every device's part on one device; `init` gives whole ones there.

    Attributes:
        config: the model's.
        axis_name: the mesh axis that splits the model.
        num_devices: n, of that axis.
        param_dtype: of the weights that `init` and `load_parameters` give, "bfloat16" or "float32".
            `apply` computes in the dtype of the weights that it is given.
        gather_logits: whether every device gives the logits of the whole vocabulary, V; if not,
            each gives its part of the vocabulary, which is padded with zeros to divide by n.

    Raises MeshwenError at construction when the model cannot be split so, or is of another
    architecture than the class.
    """

    config: ModelConfig
    axis_name: str = "X"
    num_devices: int = 1
    param_dtype: Any = "bfloat16"
    gather_logits: bool = True

    model_type: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Checks the attributes."""
        if self.model_type not in (None, self.config.model_type):
            raise MeshwenError(
                f"{self.config.name or 'the config'} is a {self.config.model_type} model, not one "
                f"for {type(self).__name__}: take FlaxCausalLM, which is for every architecture"
            )
        self.num_devices = whole_number("num_devices", self.num_devices)
        if self.num_devices < 1:
            raise MeshwenError(f"num_devices must be from 1 on, not {self.num_devices}")
        _ = self._model.weights  # Refuses what has no layout.
        super().__post_init__()

    @classmethod
    def for_model(cls, model: str, **attributes: Any) -> Self:
        """A module for a checkpoint or preset, of which the config alone is read.

        Args:
            model: a checkpoint's folder, GGUF file or hub id, or a preset such as "qwen2.5-7b".
            attributes: the others of the module.

        Raises:
            MeshwenError: there is no such model, or an attribute is impossible.
        """
        with open_checkpoint(model, load_format="dummy") as checkpoint:
            return cls(checkpoint.config, **attributes)

    @linen.compact
    def __call__(self, input_ids: Int[Array, "B T"]) -> Float32[Array, "B T V"]:
        """Logits of every position.

        Raises:
            MeshwenError: the mesh axis has another size than the module's.
        """
        if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise MeshwenError(
                "input_ids must be integers [batch, sequence], not "
                f"{input_ids.dtype} {list(input_ids.shape)}"
            )
        devices = _axis_size(self.axis_name) if self.num_devices > 1 else 1
        if devices not in (None, self.num_devices):
            raise MeshwenError(
                f"the mesh axis {self.axis_name!r} has {devices} devices, but the module is for "
                f"{self.num_devices}"
            )
        number = self._device_number(devices)
        part = None if devices is None else number
        names = dict.fromkeys(_first(layout) for layout in self._model.weights.stored)
        params = {name: self.param(name, self._initial, name, part) for name in names}
        if devices is None:
            return self._on_one_device(params, input_ids)
        return self._on_each_device(params, number, input_ids)

    def partition_specs(self) -> Plain:
        """Partition specs of the variables, one for each array."""
        specs: Plain = {"params": params_specs(self._model.weights)}
        if self.num_devices > 1:
            specs["constants"] = {"device": PartitionSpec(self.axis_name)}
        return specs

    def load_parameters(self, checkpoint: str | None, mesh: Mesh | None = None) -> Plain:
        """The variables, on the devices of a mesh.

        Args:
            checkpoint: a folder, a GGUF file or a hub id; None: dummy weights, which are the same
                on every number of devices.
            mesh: one with the axis `axis_name`; other axes get copies. None: JAX's first devices.

        Raises:
            MeshwenError: there is no such checkpoint, it does not fit the config, its weights do
                not fit the devices, or the mesh axis has another size than `num_devices`; an axis
                that is not there counts as one of size 1.
        """
        mesh = self._first_devices() if mesh is None else mesh
        if mesh.shape.get(self.axis_name, 1) != self.num_devices:
            raise MeshwenError(
                f"the mesh axis {self.axis_name!r} must be of size {self.num_devices}; the mesh's "
                f"axes are {', '.join(f'{name} of {size}' for name, size in mesh.shape.items())}"
            )
        others = tuple(name for name in mesh.axis_names if name != self.axis_name)
        model = parallel_model(
            self.config, mesh, data_axes=others, dtype=dtype_name(self.param_dtype)
        )
        variables: Plain = {"params": load_weights(model, checkpoint)}
        if self.num_devices > 1:
            variables["constants"] = {"device": np.arange(self.num_devices, dtype=np.int32)}
        # The model's mesh has axes of the type Auto; `shard_map` takes arrays on its own mesh.
        return jax.tree.map(
            lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)),
            variables,
            self.partition_specs(),
        )

    def folded(self, gradients: Plain) -> Plain:
        """Gradients with the sum of all copies' in each copy, and zero in padding.

        On several devices, what `jax.grad` gives of a function that calls `apply`, in
        `jax.shard_map` or outside of one, are the model's gradients only after this: see
        `meshwen.handoff.folded`. Differentiate a `shard_map` as a whole, from outside.

        Args:
            gradients: {"params": gradients of the weights}; other collections stay as they are.

        Raises:
            MeshwenError: there are no "params".
        """
        if "params" not in gradients:
            raise MeshwenError(
                'gradients must be as variables are, {"params": ...}, not with the keys '
                f"{brief(list(gradients))}"
            )
        return {**gradients, "params": _folded(self._model, gradients["params"])}

    @property
    def _model(self) -> ParallelModel:
        dtype = dtype_name(self.param_dtype)
        return _parallel_model(self.config, self.axis_name, self.num_devices, dtype)

    def _first_devices(self) -> Mesh:
        devices = jax.devices()
        if len(devices) < self.num_devices:
            raise MeshwenError(
                f"the module is for {self.num_devices} devices, and JAX has {len(devices)}"
            )
        return Mesh(np.array(devices[: self.num_devices]), (self.axis_name,))

    def _device_number(self, devices: int | None) -> Int[Array, " 1"]:
        """This device's number; all numbers, int32 [n], outside of a mesh."""
        if self.num_devices == 1:
            return jnp.zeros(1, jnp.int32)
        if self.has_variable("constants", "device") or self.is_initializing():
            return self.variable("constants", "device", self._own_number, devices).value
        return self._own_number(devices)

    def _own_number(self, devices: int | None) -> Int[Array, " 1"]:
        if devices is None:
            return jnp.arange(self.num_devices, dtype=jnp.int32)
        return lax.axis_index(self.axis_name).astype(jnp.int32)[None]

    def _initial(self, key: Array, name: str, number: Array | None) -> Plain:
        """Dummy weights with this first name, of the device with this number; None: of all."""
        seed = jax.random.bits(key, dtype=jnp.uint32)
        with own_settings_in_trace():
            own = (one for one in self._model.weights.stored if _first(one) == name)
            made = [(one.path, _dummy_weight(one, seed, number, self._model.dtype)) for one in own]
        return unflatten(made)[name]

    def _on_each_device(
        self, params: Plain, number: Int[Array, " 1"], input_ids: Int[Array, "B T"]
    ) -> Float32[Array, "B T V"]:
        """Logits of one device, of its part of the weights."""
        B, T = input_ids.shape
        logits = program("logits", self._model, profile="portable", batch=B, tokens=T)
        part: Array = logits.function(params, number, input_ids)
        if not self.gather_logits:
            return part
        return self._model.ops.collectives.all_gather(part, 2)[..., : self.config.vocab_size]

    def _on_one_device(
        self, params: Plain, input_ids: Int[Array, "B T"]
    ) -> Float32[Array, "B T V"]:
        """The same of all devices, computed by one: the mesh axis is an axis of arrays."""
        n, specs = self.num_devices, params_specs(self._model.weights)

        def split(array: Array, spec: PartitionSpec) -> Array:
            for axis in _split_axes(spec):
                parts = array.reshape(*array.shape[:axis], n, -1, *array.shape[axis + 1 :])
                return jnp.moveaxis(parts, axis, 0)
            return array

        axes = jax.tree.map(lambda spec: 0 if _split_axes(spec) else None, specs, is_leaf=_is_spec)
        every = jax.vmap(self._on_each_device, in_axes=(axes, 0, None), axis_name=self.axis_name)
        numbers = jnp.arange(n, dtype=jnp.int32)[:, None]
        logits = every(jax.tree.map(split, params, specs), numbers, input_ids)
        if self.gather_logits:
            return logits[0]
        return jnp.moveaxis(logits, 0, 2).reshape(*input_ids.shape, -1)


class FlaxQwen25ForCausalLM(FlaxCausalLM):
    """Qwen2.5, and other models of its architecture: see `FlaxCausalLM`."""

    model_type: ClassVar[str | None] = "qwen2"


class FlaxQwen3ForCausalLM(FlaxCausalLM):
    """Dense Qwen3: see `FlaxCausalLM`."""

    model_type: ClassVar[str | None] = "qwen3"


# Layers share what is traced of it, and its bits are those of a jitted `init`.
_values = jax.jit(dummy_values, static_argnums=(2, 3, 4))


@partial(jax.jit, static_argnums=0)
def _folded(model: ParallelModel, gradients: Plain) -> Plain:
    """`meshwen.handoff.folded`, where the axes of the arrays' mesh may have either type, too."""
    shardings = jax.tree.map(lambda array: jax.typeof(array).sharding, gradients)
    if not any(AxisType.Explicit in one.mesh.axis_types for one in jax.tree.leaves(shardings)):
        return folded(model, gradients)
    return jax.sharding.auto_axes(partial(folded, model), out_sharding=shardings)(gradients)


@lru_cache(maxsize=16)
def _parallel_model(
    config: ModelConfig, axis_name: str, num_devices: int, dtype: str
) -> ParallelModel:
    return parallel_model(
        config, AbstractMesh((num_devices,), (axis_name,)), data_axes=(), dtype=dtype
    )


def _axis_size(name: str) -> int | None:
    """Of a mesh axis whose devices this is traced for; None where it is not."""
    try:
        return lax.axis_size(name)
    except NameError:
        return None


def _first(layout: WeightLayout) -> str:
    """The first name of a weight's path."""
    return layout.path.split(".")[0]


def _dummy_weight(
    layout: WeightLayout, seed: Array, number: Array | None, dtype: jnp.dtype
) -> Array:
    """What `dummy_values` gives for a weight, or for a device's part of it."""
    positions = []
    for source, split in zip(layout.positions(), layout.sharding.spec, strict=True):
        axis = jnp.asarray(source, jnp.int32)
        if split and number is not None:
            axis = axis.reshape(layout.plan.model_devices, -1)[number[0]]
        positions.append(axis)
    one = layout.declaration
    named = seed ^ jnp.uint32(zlib.crc32(one.name.encode()))
    return _values(positions, named, one.dummy_mean, layout.inputs_first, dtype)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _split_axes(spec: PartitionSpec) -> list[int]:
    """The axes that a spec splits: one, or none."""
    return [axis for axis, names in enumerate(spec) if names]
