# SPDX-License-Identifier: Apache-2.0
"""A program of a model: what to lower, shard, compile and export.

    model = parallel_model("demo", "1x8", dtype="float32")
    decode = program("decode", model, batch=2, length=128)
    print(decode.lower().as_text())

A mesh may be abstract, with no devices behind it, and its axes may have any names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike, fsdecode
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from meshwen.checkpoints import open_checkpoint
from meshwen.common.arguments import brief
from meshwen.common.choices import OUTPUTS, PLATFORMS, PROFILES, PROGRAMS, check_choice
from meshwen.engine.options import EngineOptions
from meshwen.errors import MeshwenError
from meshwen.handoff.plain import Plain, params_shapes, plain_cache
from meshwen.handoff.portable import SharedPositions
from meshwen.handoff.steps import NativeSteps, PortableSteps
from meshwen.models.config import ModelConfig
from meshwen.models.parallel_model import ParallelModel
from meshwen.parallel.mesh import make_mesh
from meshwen.runtime.jax_settings import own_settings, own_settings_in_trace

_OPTIONS = ("dtype", "numerics", "quantization")  # of `parallel_model`
_MOST = (1 << 31) - 1  # of any size
_TOKENS, _LENGTH = 16, 128  # where nobody says otherwise
_LOWERED_FOR = "cpu"  # where a mesh has no devices that say


@dataclass(frozen=True)
class Sizes:
    """The static sizes of a program.

    Attributes:
        batch: B, sequences.
        tokens: T, tokens of each in a prompt; 1 in a decode step.
        length: S, positions of the cache.
    """

    batch: int
    tokens: int
    length: int


@dataclass(frozen=True)
class Program:
    """One step of a model, as each device of a mesh runs it, with all that is needed to compile it.

    Arguments and results are dicts, lists and arrays: see `meshwen.handoff.plain`.

    Attributes:
        name: "logits", "prefill" or "decode".
        profile: "native" or "portable".
        model: without kernels.
        sizes: the static sizes.
        function: what each device computes of its parts of the arguments.
        arguments: shapes, dtypes and shardings of the arguments, whole, by name, in order.
        results: the same of the results.
        donated: positions of arguments whose memory the results take.
    """

    name: str
    profile: str
    model: ParallelModel
    sizes: Sizes
    function: Callable[..., Any]
    arguments: Mapping[str, Plain]
    results: Mapping[str, Plain]
    donated: tuple[int, ...]

    @property
    def mesh(self) -> Mesh | AbstractMesh:
        """The devices."""
        return self.model.mesh

    @property
    def in_specs(self) -> tuple[Plain, ...]:
        """Partition specs of the arguments."""
        return tuple(_specs(argument) for argument in self.arguments.values())

    @property
    def out_specs(self) -> Plain:
        """Partition specs of what the function gives."""
        specs = tuple(_specs(result) for result in self.results.values())
        return specs if len(specs) > 1 else specs[0]

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """Options of XLA's compiler that results depend on."""
        return dict(self.model.compiler_options or {})

    @property
    def lacks_kernels(self) -> bool:
        """Whether the engine would compute with kernels here, which the program does not."""
        return replace(self.model, kernels=True).backend != self.model.backend

    @cached_property
    def mapped(self) -> Callable[..., Any]:
        """The function of whole arrays: under `jax.shard_map`."""
        return jax.shard_map(
            self.function,
            mesh=self.mesh,
            in_specs=self.in_specs,
            out_specs=self.out_specs,
            check_vma=False,
        )

    def jitted(self) -> Any:
        """The mapped function under `jax.jit`, with its donation and its compiler options.

        The cache that it is given is consumed. Inside a `jax.jit` of your own take `mapped`, as
        compiler options are for the outermost one.
        """
        mapped = self.mapped

        def named(*arguments: Any) -> Any:
            return mapped(*arguments)

        named.__name__ = named.__qualname__ = self.name
        return jax.jit(
            named, donate_argnums=self.donated, compiler_options=self.compiler_options or None
        )

    def lower(self, platform: str | None = None) -> jax.stages.Lowered:
        """The program lowered to StableHLO.

        Args:
            platform: "cpu", "tpu", "cuda" or "rocm"; None: that of the mesh's devices, or "cpu"
                where it has none.

        Raises:
            MeshwenError: there is no such platform.
        """
        platforms = self._platforms(platform)
        with own_settings():
            traced = self.jitted().trace(*self.arguments.values())
            lowered: jax.stages.Lowered = traced.lower(lowering_platforms=platforms)
        return lowered

    def exported(self, platform: str | None = None) -> jax.export.Exported:
        """The program as `jax.export` serialises it; it needs no device to be made.

        Args:
            platform: as of `lower`.

        Raises:
            MeshwenError: there is no such platform.
        """
        platforms = self._platforms(platform)
        # XLA's own, and in every version of it: exact numerics lays operands out with it.
        unchecked = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
        if self.profile == "portable":  # Nothing in it depends on the platform.
            unchecked.append(jax.export.DisabledSafetyCheck.platform())
        with own_settings():
            export = jax.export.export(
                self.jitted(), platforms=platforms, disabled_checks=unchecked
            )
            return export(*self.arguments.values())

    def export(self, folder: str | PathLike[str], params: Plain | None = None, **how: Any) -> Path:
        """Writes it to a new folder: see `meshwen.handoff.exporting.export`."""
        from meshwen.handoff.exporting import export  # It imports this module.

        return export(self, folder, params, **how)

    def _platforms(self, platform: str | None) -> tuple[str, ...]:
        """What to lower for."""
        if platform is not None:
            check_choice("platform", platform, PLATFORMS)
            return (platform,)
        if not isinstance(self.mesh, Mesh):
            return (_LOWERED_FOR,)
        found: str = self.mesh.devices.flat[0].platform
        return ({"gpu": "cuda"}.get(found, found),)


def parallel_model(
    model: str | PathLike[str] | ModelConfig,
    mesh: str | int | Mesh | AbstractMesh = "1",
    *,
    data_axes: str | Sequence[str] | None = None,
    **options: Any,
) -> ParallelModel:
    """A model on a mesh, without kernels and without weights.

    Args:
        model: its config; or a checkpoint's folder, GGUF file or hub id, of which the config alone
            is read; or a preset such as "qwen2.5-7b".
        mesh: a mesh string, or a JAX mesh, concrete or abstract, with axes of any names.
        data_axes: the axis, or axes, of a JAX mesh that split the batch; all others split the
            model. None: those whose names begin with "data".
        options: `dtype`, `numerics` and `quantization`, as of `from_pretrained`.

    Raises:
        MeshwenError: there is no such model or mesh, or the model cannot be split so.
    """
    if unknown := set(options) - set(_OPTIONS):
        raise MeshwenError(
            f"there is no option {sorted(unknown)[0]!r} here; there are {', '.join(_OPTIONS)}"
        )
    chosen = EngineOptions(**options)
    if isinstance(model, str | PathLike):
        with open_checkpoint(fsdecode(model), load_format="dummy") as checkpoint:
            model = checkpoint.config
    if not isinstance(model, ModelConfig):
        raise MeshwenError(f"the model must be a path, a name or a config, not {brief(model)}")
    data: tuple[str, ...] | None = None
    if data_axes is not None:
        data = (data_axes,) if isinstance(data_axes, str) else tuple(data_axes)
    if not isinstance(mesh, Mesh | AbstractMesh):
        if data:
            raise MeshwenError(f"data_axes name axes of a JAX mesh; {mesh!r} names its own")
        data, mesh = None, make_mesh(mesh)
    elif absent := [name for name in data or () if name not in mesh.axis_names]:
        raise MeshwenError(
            f"the mesh has no axis {absent[0]!r}; its axes are {', '.join(mesh.axis_names)}"
        )
    elif len(set(data or ())) < len(data or ()):
        raise MeshwenError("data_axes name an axis twice")
    # Axes typed Explicit would have JAX ask for shardings in every function.
    elif isinstance(mesh, Mesh):
        mesh = Mesh(mesh.devices, mesh.axis_names)
    else:
        mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names)
    return ParallelModel(
        model,
        mesh,
        jnp.dtype(chosen.dtype),
        chosen.numerics,
        chosen.quantization,
        kernels=False,
        data_names=data,
    )


def program(
    name: str,
    model: ParallelModel,
    *,
    profile: str = "native",
    batch: int = 1,
    tokens: int | None = None,
    length: int | None = None,
    output: str = "logits",
    composites: bool = False,
) -> Program:
    """A program of a model.

    Its arguments, by profile ("native"; "portable" has `device`, int32 [n], before the cache, or
    before `input_ids` where there is none: the numbers 0 to n - 1, of which each device gets its
    own):

    - logits: params, input_ids int32 [B, T] -> logits float32 [B, T, V]
    - prefill: params, cache, input_ids int32 [B, T], lengths int32 [B] -> output, cache. A prompt
      stands at the left, at most T long. Portable: positions int32 [T], which are 0 to T - 1, and
      last int32 [1], the index of all prompts' last token, in the place of lengths.
    - decode: params, cache, input_ids int32 [B, 1], positions int32 [B] -> output, cache. Portable:
      one position int32 [1] of all sequences.

    The output is logits float32 [B, V], or tokens int32 [B]. V is padded to the mesh; the logits of
    padding are 0, so cut them off before an argmax. Positions are below the cache's length: beyond,
    nothing says so, and results mean nothing.

    Args:
        name: "logits", "prefill" or "decode".
        model: of `parallel_model`.
        profile: "native" is what the engine runs here. "portable" consists of fewer operations, for
            compilers that know few: see `meshwen.handoff.portable`.
        batch: B, a multiple of the devices that split the batch.
        tokens: T, of logits and prefill; None: 16.
        length: S, positions of the cache, of prefill and decode; None: 128.
        output: of prefill and decode, "logits" or "tokens", the likeliest.
        composites: in the portable profile, whether norms and attention are StableHLO composites
            under Tenstorrent's names.

    Raises:
        MeshwenError: there is no such program or profile, a size is impossible, or the profile does
            not have what is asked for.
    """
    check_choice("program", name, PROGRAMS)
    check_choice("profile", profile, PROFILES)
    check_choice("output", output, OUTPUTS)
    if model.kernels:
        model = replace(model, kernels=False)
    if unused := [
        what
        for what, given in (
            ("tokens", name == "decode" and tokens is not None),
            ("length", name == "logits" and length is not None),
            ("output", name == "logits" and output != "logits"),
        )
        if given
    ]:
        raise MeshwenError(f"the {name} program has no {unused[0]}: leave it out")
    wide = 1 if name == "decode" else _TOKENS if tokens is None else tokens
    sizes = Sizes(batch, wide, _LENGTH if length is None else length)
    _check_sizes(name, model, sizes)
    portable = profile == "portable"
    if portable and model.numerics == "exact":
        raise MeshwenError("the portable profile has fast numerics alone: choose the native one")
    if model.numerics == "exact" and not isinstance(model.mesh, Mesh):
        raise MeshwenError(
            "exact numerics are for the devices of a mesh, and this has none: give one with "
            "devices, or choose fast numerics"
        )
    if composites and not portable:
        raise MeshwenError("composites are of the portable profile: choose that, or no composites")
    chosen = output == "tokens"
    steps = PortableSteps(model, chosen, composites) if portable else NativeSteps(model, chosen)
    step = getattr(steps, name)

    def function(*arguments: Any) -> Any:
        with own_settings_in_trace():
            return step(*arguments)

    arguments = _arguments(name, model, sizes, portable)
    return Program(
        name,
        profile,
        model,
        sizes,
        function,
        arguments,
        _results(name, model, sizes, chosen, arguments),
        (list(arguments).index("cache"),) if "cache" in arguments else (),
    )


def _check_sizes(name: str, model: ParallelModel, sizes: Sizes) -> None:
    for what, size in (("batch", sizes.batch), ("tokens", sizes.tokens), ("length", sizes.length)):
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= _MOST:
            raise MeshwenError(f"{what} must be a whole number from 1 to {_MOST}, not {size!r}")
    parts, context = model.plan.data_devices, model.config.context_length
    if sizes.batch % parts:
        raise MeshwenError(
            f"batch must be a multiple of {parts}, the devices that split it, not {sizes.batch}"
        )
    if name != "logits" and sizes.tokens > sizes.length:
        raise MeshwenError(
            f"tokens ({sizes.tokens}) must be at most length, the cache's {sizes.length} positions"
        )
    if (longest := sizes.tokens if name == "logits" else sizes.length) > context:
        raise MeshwenError(f"{longest} positions are more than the model's context of {context}")


def _arguments(name: str, model: ParallelModel, sizes: Sizes, portable: bool) -> dict[str, Plain]:
    plan, (B, T) = model.plan, (sizes.batch, sizes.tokens)

    def ints(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(plan.mesh, spec))

    found: dict[str, Plain] = {"params": params_shapes(model.weights)}
    if portable:
        found["device"] = ints((plan.model_devices,), PartitionSpec(plan.model_axes or None))
    if name != "logits":
        layout = SharedPositions.cache_layout if portable else None
        found["cache"] = plain_cache(model.cache_shapes(B, sizes.length, layout))
    found["input_ids"] = ints((B, T), plan.spec("batch"))
    if name == "prefill" and portable:
        found |= {"positions": ints((T,), PartitionSpec()), "last": ints((1,), PartitionSpec())}
    elif name == "prefill":
        found["lengths"] = ints((B,), plan.spec("batch"))
    elif name == "decode":
        shape, spec = ((1,), PartitionSpec()) if portable else ((B,), plan.spec("batch"))
        found["position" if portable else "positions"] = ints(shape, spec)
    return found


def _results(
    name: str, model: ParallelModel, sizes: Sizes, tokens: bool, arguments: Mapping[str, Plain]
) -> dict[str, Plain]:
    plan, vocabulary = model.plan, model.plan.axis_length("vocab")
    if name == "logits":
        shape: tuple[int, ...] = (sizes.batch, sizes.tokens, vocabulary)
        logits = jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=plan.sharding("batch", "length", "vocab")
        )
        return {"logits": logits}
    if tokens:
        output = jax.ShapeDtypeStruct((sizes.batch,), jnp.int32, sharding=plan.sharding("batch"))
        return {"tokens": output, "cache": arguments["cache"]}
    shape = (sizes.batch, vocabulary)
    output = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=plan.sharding("batch", "vocab"))
    return {"logits": output, "cache": arguments["cache"]}


def _specs(shapes: Plain) -> Plain:
    return jax.tree.map(lambda shape: shape.sharding.spec, shapes)
