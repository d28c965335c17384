# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5 and Qwen3 in JAX, tensor-parallel on any mesh of devices.

    from meshwen import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained("demo", mesh="1x8")
    for piece in model.stream("..."):
        print(piece, end="")

Names are imported when they are first used, and importing the package starts no JAX back end.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwen.causal_lm import AutoModelForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
    from meshwen.engine.request import Completion, Event, Request
    from meshwen.engine.sampling_params import SamplingParams
    from meshwen.errors import MeshwenError
    from meshwen.models.qwen2 import Qwen2Config
    from meshwen.models.qwen3 import Qwen3Config
    from meshwen.parallel.mesh import make_mesh
    from meshwen.runtime.compilation_cache import enable_compilation_cache
    from meshwen.tokenizer.tokenizer import Tokenizer

    __version__: str

__all__ = [
    "AutoModelForCausalLM",
    "Completion",
    "Event",
    "MeshwenError",
    "Qwen2Config",
    "Qwen2ForCausalLM",
    "Qwen3Config",
    "Qwen3ForCausalLM",
    "Request",
    "SamplingParams",
    "Tokenizer",
    "enable_compilation_cache",
    "make_mesh",
]

_MODULES = {
    "AutoModelForCausalLM": "causal_lm",
    "Completion": "engine.request",
    "Event": "engine.request",
    "MeshwenError": "errors",
    "Qwen2Config": "models.qwen2",
    "Qwen2ForCausalLM": "causal_lm",
    "Qwen3Config": "models.qwen3",
    "Qwen3ForCausalLM": "causal_lm",
    "Request": "engine.request",
    "SamplingParams": "engine.sampling_params",
    "Tokenizer": "tokenizer.tokenizer",
    "enable_compilation_cache": "runtime.compilation_cache",
    "make_mesh": "parallel.mesh",
}


def __getattr__(name: str) -> Any:
    """Imports a public name, or looks up `__version__`, on first use."""
    if name == "__version__":
        try:
            return metadata.version("meshwen")
        except metadata.PackageNotFoundError:  # Run from its sources.
            return "0+unknown"
    if name not in _MODULES:
        raise AttributeError(f"module 'meshwen' has no attribute {name!r}")
    return getattr(import_module(f"meshwen.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
