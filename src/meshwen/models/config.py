# SPDX-License-Identifier: Apache-2.0
"""A model's hyperparameters: what architectures share, and what they may be."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from meshwen.common.json_files import check_shape, shown
from meshwen.errors import MeshwenError
from meshwen.models.config_json import (
    LAYER_TYPES,
    MOST_LAYERS,
    checked_config,
    config_file,
    folder_name,
    hyperparameters,
    named_architecture,
    read_config,
    sliding_attention,
)
from meshwen.models.rope_scaling import RopeScaling
from meshwen.parallel.sizes import ModelSizes

# A hundred times what has been published, and little enough to lay out in a moment.
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": MOST_LAYERS,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "max_position_embeddings": 2**31 - 1,
}
_LARGEST_QUERY = 2**20  # num_attention_heads x head_dim
# What float32 holds, times a factor of RoPE scaling too.
_EPSILONS = (1e-37, 1.0)
_LARGEST_THETA = 1e28


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyperparameters of one model; hashable, so that it can be a static argument of jit.

    Each architecture has a subclass; `meshwen.models.registry` finds the one of a config.json.

    ``head_dim`` 0 means ``hidden_size // num_attention_heads`` and empty ``layer_types`` means full
    attention in every layer; both are filled in at construction, so readers always see the value.
    ``sliding_window`` (tokens a query may see, itself included) is None when no layer may slide.
    ``torch_dtype`` is the type the checkpoint was written in. ``name`` is only for people: configs
    that differ in nothing else are equal.

    Raises MeshwenError at construction when the values contradict each other.
    """

    # As a config.json names it.
    model_type: ClassVar[str]
    architecture: ClassVar[str]

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    torch_dtype: str = "float32"
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Fill in derived fields and raise MeshwenError on contradictions."""
        for key, most in _LARGEST.items():
            if not 1 <= (value := getattr(self, key)) <= most:
                raise MeshwenError(f"{key} must be from 1 to {most}, found {shown(value)}")
        self._check_heads()
        self._check_layers()
        if not _EPSILONS[0] <= self.rms_norm_eps <= _EPSILONS[1]:
            raise MeshwenError(
                f"rms_norm_eps must be from {_EPSILONS[0]:g} to {_EPSILONS[1]:g}, "
                f"found {self.rms_norm_eps}"
            )
        if not 1 < self.rope_theta <= _LARGEST_THETA:
            raise MeshwenError(
                f"rope_theta must be above 1, and at most {_LARGEST_THETA:g}, "
                f"found {self.rope_theta}"
            )
        if self.context_length >= 2**31:
            raise MeshwenError(
                "max_position_embeddings and the RoPE scaling factor make a context of "
                f"{self.context_length:.3g} tokens; positions are 32-bit integers"
            )

    def _check_heads(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise MeshwenError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if not self.head_dim:
            if self.hidden_size % heads:
                raise MeshwenError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{heads} and there is no head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise MeshwenError(
                f"rotary embeddings need an even head_dim, found {shown(self.head_dim)}"
            )
        if heads * self.head_dim > _LARGEST_QUERY:
            raise MeshwenError(
                f"num_attention_heads {heads} times head_dim {shown(self.head_dim)} is above "
                f"{_LARGEST_QUERY}"
            )

    def _check_layers(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("full_attention",) * self.num_hidden_layers)
        if len(self.layer_types) != self.num_hidden_layers:
            raise MeshwenError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers "
                f"{self.num_hidden_layers}"
            )
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise MeshwenError(
                f"layer type {shown(unknown[0])} is not supported; "
                f"supported: {', '.join(LAYER_TYPES)}"
            )
        if self.sliding_window is not None and not 1 <= self.sliding_window < 2**31:
            raise MeshwenError(
                f"sliding_window must be at least 1, below {2**31}, "
                f"found {shown(self.sliding_window)}"
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise MeshwenError(
                "layer_types has sliding_attention, but use_sliding_window is false or "
                "sliding_window is not set"
            )

    @property
    def sizes(self) -> ModelSizes:
        """The sizes that a layout on a mesh depends on."""
        return ModelSizes(
            vocab=self.vocab_size,
            embed=self.hidden_size,
            mlp=self.intermediate_size,
            query_heads=self.num_attention_heads,
            key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
        )

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence: the positions trained, stretched by RoPE scaling."""
        scaling = self.rope_scaling
        if scaling is None:
            return self.max_position_embeddings
        trained = scaling.original_max_position_embeddings or self.max_position_embeddings
        return max(self.max_position_embeddings, int(trained * scaling.factor))

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read ``path``: a ``config.json``, or the folder that holds one; named after the folder.

        Raises MeshwenError, which names the file, when it is missing, not JSON or not supported.
        """
        file = config_file(path)
        return cls.from_dict(read_config(file), name=folder_name(file), where=str(file))

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, name: str | None = None, where: str = "config.json"
    ) -> Self:
        """Build a config from the contents of a ``config.json``.

        Keys that do not change the forward pass (``use_cache``, ``initializer_range``, ...) are
        ignored, whatever they hold; so is ``quantization_config``, which `declared_quantization`
        reads. ``name`` defaults to ``_name_or_path``; ``where`` is what messages begin with.

        Raises MeshwenError: another architecture, a missing key, a value of the wrong type, or a
        setting the model does not implement.
        """
        data = check_shape(data, dict[str, Any], where)
        name = str(data.get("_name_or_path") or "") if name is None else name
        named = named_architecture(data, where)
        if not cls.is_named(*named):
            raise unsupported(*named, [cls], where)
        shape = checked_config(data, where)
        sliding_window, layer_types = sliding_attention(data, where)
        try:
            cls.check_file(data)
            return cls(
                **hyperparameters(shape),
                layer_types=layer_types,
                sliding_window=sliding_window,
                name=name,
            )
        except MeshwenError as error:
            raise MeshwenError(f"{where}: {error}") from None

    @classmethod
    def check_file(cls, data: Mapping[str, Any]) -> None:
        """Refuse a config.json by what this architecture alone has.

        Raises MeshwenError, without the file's name.
        """

    @classmethod
    def is_named(cls, architectures: list[str], model_type: str | None) -> bool:
        """Whether a config.json names this architecture.

        Its base model (`Qwen2Model`) counts as it: the same without its head, which tied embeddings
        stand for.
        """
        own = {cls.architecture, cls.architecture.replace("ForCausalLM", "Model")}
        by_name = not architectures or not own.isdisjoint(architectures)
        return by_name and model_type in (None, cls.model_type)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a ``config.json`` that transformers and this class read."""
        data = {key: value for key, value in asdict(self).items() if key != "name"}
        sliding = [i for i, kind in enumerate(self.layer_types) if kind == "sliding_attention"]
        eos = list(self.eos_token_id)
        data.update(
            architectures=[self.architecture],
            model_type=self.model_type,
            hidden_act="silu",
            layer_types=list(self.layer_types),
            use_sliding_window=self.sliding_window is not None,
            max_window_layers=sliding[0] if sliding else self.num_hidden_layers,
            eos_token_id=(eos[0] if len(eos) == 1 else eos) if eos else None,
            rope_scaling=self.rope_scaling.to_dict() if self.rope_scaling else None,
        )
        return data


def unsupported(
    architectures: list[str],
    model_type: str | None,
    supported: Iterable[type[ModelConfig]],
    where: str,
) -> MeshwenError:
    """The error for a config.json that names another architecture."""
    own = ", ".join(f'{one.architecture} (model_type "{one.model_type}")' for one in supported)
    return MeshwenError(
        f"{where}: architecture {shown(', '.join(architectures) or 'unnamed')} "
        f"(model_type {shown(model_type)}) is not supported; supported: {own}"
    )
