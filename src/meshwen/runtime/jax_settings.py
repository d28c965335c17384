# SPDX-License-Identifier: Apache-2.0
"""JAX's settings that the package's programs are traced and run under, whatever the caller's are.

A caller may have 64-bit types on, promotion forbidden, transfers guarded or another mesh set. The
package's own programs need none of it and would fail or give other bits under some of it. So each
is traced and called under `own_settings`, which hold in this thread and no longer than the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshwen.errors import MeshwenError
from meshwen.runtime.jax_versions import enable_x64, jaxlib_version

_TRANSFERS = ("host_to_device", "device_to_host", "device_to_device")
# What the programs need, by how it is entered; and where `jax.config` shows what the caller has.
# None there is JAX's default, which is what they need.
_OWN: tuple[tuple[Callable[[Any], Any], Any, tuple[str, ...]], ...] = (
    (enable_x64, False, ("jax_enable_x64",)),
    (jax.numpy_rank_promotion, "allow", ("jax_numpy_rank_promotion",)),
    (jax.numpy_dtype_promotion, "standard", ("jax_numpy_dtype_promotion",)),
    (jax.default_matmul_precision, None, ("jax_default_matmul_precision",)),
    (
        jax.transfer_guard,
        "allow",
        ("jax_transfer_guard", *(f"jax_transfer_guard_{way}" for way in _TRANSFERS)),
    ),
    (jax.disable_jit, False, ("jax_disable_jit",)),
)
# Settings that JAX offers no way to leave for a while, by what they have to be.
_REQUIRED: dict[str, Any] = {
    "eager_constant_folding": False,  # Evaluates a device's index outside of the mesh.
    "jax_error_checking_behavior_nan": "ignore",  # These three cannot be traced in a shard_map.
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    "jax_no_tracing": False,
    "jax_no_execution": False,
}
# jax issue 39103: a sum over the result of a batched matmul is cut short.
_MISCOMPILES_ON_CPUS = "0.10.2"


@contextmanager
def own_settings() -> Iterator[None]:
    """What the package's programs need, in the place of what the caller has set."""
    with ExitStack() as settings:
        # Outside of a trace only: there, JAX refuses it.
        if not jax.sharding.get_abstract_mesh().empty:
            settings.enter_context(jax.set_mesh(Mesh(np.empty((), object), ())))
        settings.enter_context(own_settings_in_trace())
        yield


@contextmanager
def own_settings_in_trace() -> Iterator[None]:
    """The same where a function is being traced, on the caller's mesh, which stays as it is."""
    with ExitStack() as settings:
        # Only what differs: to enter all takes as long as the rest of the host's work for a step.
        for enter, needed, names in _OWN:
            if any(getattr(jax.config, name) not in (needed, None) for name in names):
                settings.enter_context(enter(needed))
        yield


class Jitted:
    """A jitted function that is traced, lowered and called under `own_settings`.

    Args:
        function: what to compile.
        options: of `jax.jit`.

    Attributes:
        jitted: what `jax.jit` gives.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        self.jitted = jax.jit(function, **options)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The function's result."""
        with own_settings():
            return self.jitted(*arguments, **keywords)

    def lower(self, *arguments: Any, **keywords: Any) -> jax.stages.Lowered:
        """The function lowered for such arguments; see `jax.jit`."""
        with own_settings():
            return self.jitted.lower(*arguments, **keywords)


def devices() -> list[jax.Device]:
    """The default back end's devices, of all processes; starts the back end.

    Raises:
        MeshwenError: JAX cannot start it, or `check` refuses it.
    """
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise MeshwenError(_cannot_start(error)) from error
    check(found[0])
    return found


def check(device: jax.Device) -> None:
    """Refuses what keeps a model from running right, and cannot be left for a while.

    Raises:
        MeshwenError: a setting of JAX does, or its version on such a device.
    """
    for name, required in _REQUIRED.items():
        value = jax.config.values.get(name, required)
        if str(getattr(value, "value", value)) != str(required):
            raise MeshwenError(
                f"JAX's setting {name} is {value}, under which a model cannot run; set it back to "
                f"{required} (environment: {name.upper()})"
            )
    version = jaxlib_version()
    if device.platform == "cpu" and version == _MISCOMPILES_ON_CPUS:
        raise MeshwenError(
            f"jaxlib {version} gives wrong results on CPUs (jax issue 39103): install another "
            "version of jax and jaxlib, such as 0.10.1 or 0.11"
        )


def _cannot_start(error: BaseException) -> str:
    asked = jax.config.values.get("jax_platforms") or jax.config.values.get("jax_platform_name")
    reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS=")[0]
    why = f" ({reason})" if reason else ""
    if not asked:
        return f"JAX cannot start a back end{why}"
    return (
        f"JAX was asked for the platform {asked!r} (JAX_PLATFORMS), which is not there{why}; "
        "install what JAX needs for it, such as jax[cuda12], or ask for cpu"
    )
