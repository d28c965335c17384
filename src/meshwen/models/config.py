# SPDX-License-Identifier: Apache-2.0
"""A model's hyperparameters, from a Hugging Face ``config.json``: what architectures share.

Field names and meanings are those of transformers' configs. The spellings of transformers 4
(``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``, ``dtype``) are both
read. What this package cannot run exactly is refused, never guessed.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Required, Self, cast

from typing_extensions import TypedDict

from meshwen.common.json_files import Finite, check_shape, read_json, shown
from meshwen.common.paths import exists, user_path
from meshwen.errors import MeshwenError
from meshwen.models.rope_scaling import RopeFile, RopeScaling, read_rope
from meshwen.parallel.sizes import ModelSizes

LAYER_TYPES = ("full_attention", "sliding_attention")

# A hundred times what has been published, and little enough to lay out in a moment.
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "max_position_embeddings": 2**31 - 1,
}
_LARGEST_QUERY = 2**20  # num_attention_heads x head_dim
# What float32 holds, times a factor of RoPE scaling too.
_EPSILONS = (1e-37, 1.0)
_LARGEST_THETA = 1e28


class _Head(TypedDict, total=False):
    """What names the architecture in a config.json."""

    architectures: list[str] | str | None
    model_type: str | None


class _DualChunk(TypedDict, total=False):
    original_max_position_embeddings: int


class ConfigFile(TypedDict, total=False):
    """What the model needs of a config.json. Other keys, and their values, may be anything."""

    vocab_size: Required[int]
    hidden_size: Required[int]
    intermediate_size: Required[int]
    num_hidden_layers: Required[int]
    num_attention_heads: Required[int]
    num_key_value_heads: Required[int | None]
    head_dim: int | None
    max_position_embeddings: Required[int]
    dual_chunk_attention_config: _DualChunk | None
    original_max_position_embeddings: int | None
    rms_norm_eps: Required[Finite]
    rope_theta: Finite | None
    rope_scaling: RopeFile | None
    rope_parameters: RopeFile | None
    partial_rotary_factor: Finite | None
    tie_word_embeddings: bool | None
    use_sliding_window: bool | None
    layer_types: list[str] | None
    eos_token_id: int | list[int] | None


class _SlidingFile(TypedDict, total=False):
    """What is needed besides where layers may slide."""

    sliding_window: Required[int | None]
    max_window_layers: int | None


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
        _refuse_unsupported(data, where)
        shape: ConfigFile = check_shape(cast(ConfigFile, data), ConfigFile, where)
        sliding_window, layer_types = _sliding_attention(data, where)
        try:
            cls.check_file(data)
            max_positions = _max_positions(shape)
            rope_theta, rope_scaling = read_rope(data, max_positions)
            return cls(
                vocab_size=shape["vocab_size"],
                hidden_size=shape["hidden_size"],
                intermediate_size=shape["intermediate_size"],
                num_hidden_layers=shape["num_hidden_layers"],
                num_attention_heads=shape["num_attention_heads"],
                num_key_value_heads=_or(shape["num_key_value_heads"], shape["num_attention_heads"]),
                head_dim=_or(shape.get("head_dim"), 0),
                max_position_embeddings=max_positions,
                rms_norm_eps=float(shape["rms_norm_eps"]),
                rope_theta=rope_theta,
                rope_scaling=rope_scaling,
                tie_word_embeddings=bool(shape.get("tie_word_embeddings")),
                layer_types=layer_types,
                sliding_window=sliding_window,
                bos_token_id=_token_id(data.get("bos_token_id")),
                eos_token_id=_token_ids(shape.get("eos_token_id")),
                pad_token_id=_token_id(data.get("pad_token_id")),
                torch_dtype=_dtype(data),
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


def config_file(path: str | Path) -> Path:
    """The ``config.json`` of a folder, or the file itself; MeshwenError when it is not there."""
    path = user_path(path)
    folder = exists(path) and path.is_dir()
    file = path / "config.json" if folder else path
    if not exists(file):
        if folder:
            raise MeshwenError(f"{path}: the folder has no config.json")
        raise MeshwenError(f"{path}: no such file or folder")
    return file


def read_config(file: Path) -> dict[str, Any]:
    """The object in a ``config.json``. Raises MeshwenError when there is none."""
    return read_json(file, dict[str, Any])


def folder_name(file: Path) -> str:
    """The name of the folder that holds a file."""
    return os.path.basename(os.path.dirname(os.path.abspath(file)))


def named_architecture(data: Mapping[str, Any], where: str) -> tuple[list[str], str | None]:
    """``architectures`` and ``model_type`` of a config.json; MeshwenError where it has neither."""
    head = {key: data[key] for key in ("architectures", "model_type") if key in data}
    head = check_shape(head, cast(type[dict[str, Any]], _Head), where)
    names, model_type = head.get("architectures") or [], head.get("model_type")
    if not names and model_type is None:
        raise MeshwenError(f"{where}: neither architectures nor model_type is given")
    return [names] if isinstance(names, str) else names, model_type


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


def declared_quantization(data: Mapping[str, Any]) -> str | None:
    """What ``quantization_config`` names; None where it is empty.

    It may be left over from a copy whose weights are floating-point again, as the tensors show.
    """
    declared = data.get("quantization_config")
    if not declared:
        return None
    method = declared.get("quant_method") if isinstance(declared, Mapping) else declared
    return method if isinstance(method, str) else "unnamed"


def _refuse_unsupported(data: Mapping[str, Any], where: str) -> None:
    """Raise MeshwenError for a config whose model would not be the one this package computes."""
    activation = data.get("hidden_act")
    if activation not in (None, "silu"):
        raise MeshwenError(
            f'{where}: hidden_act {shown(activation)} is not supported; supported: "silu"'
        )
    if data.get("is_causal") not in (None, True):
        raise MeshwenError(f"{where}: is_causal false (bidirectional attention) is not supported")


def _sliding_attention(data: Mapping[str, Any], where: str) -> tuple[int | None, tuple[str, ...]]:
    """Return (sliding_window, layer_types) by the rule of transformers' Qwen2Config.

    The first ``max_window_layers`` layers attend to everything and the ones above slide, unless
    ``layer_types`` says which do.
    """
    window, slides = None, bool(data.get("use_sliding_window"))
    if slides:
        window = check_shape(cast(_SlidingFile, data), _SlidingFile, where)["sliding_window"]
    if (given := data.get("layer_types")) is not None:
        if not given:
            raise MeshwenError(
                f"{where}: layer_types is empty; leave it out or give one entry per layer"
            )
        return window, tuple(given)
    if window is None:
        return None, ()
    if data.get("max_window_layers") is None:
        raise MeshwenError(f"{where}: max_window_layers is missing")
    layers = data["num_hidden_layers"]
    if layers > _LARGEST["num_hidden_layers"]:  # What is refused, and is not to size anything.
        return window, ()
    full = min(max(data["max_window_layers"], 0), layers)
    return window, LAYER_TYPES[:1] * full + LAYER_TYPES[1:] * (layers - full)


def _max_positions(data: ConfigFile) -> int:
    """Return the context length; without dual chunk attention, the one before its extension.

    Qwen2.5-1M checkpoints declare 1010000 positions but reach beyond 262144 only by dual chunk
    attention (arXiv 2402.17463), which is plain attention up to there and not implemented here.
    """
    positions, dual_chunk = data["max_position_embeddings"], data.get("dual_chunk_attention_config")
    if not dual_chunk:
        return positions
    if "original_max_position_embeddings" not in dual_chunk:
        raise MeshwenError(
            "dual_chunk_attention_config.original_max_position_embeddings is missing"
        )
    return min(positions, dual_chunk["original_max_position_embeddings"])


def _dtype(data: Mapping[str, Any]) -> str:
    """Return the checkpoint's dtype; both keys present: ``dtype`` wins, as in transformers.

    The files' tensors have the last word on it, so it may be anything.
    """
    value = data.get("dtype") or data.get("torch_dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else "float32"


def _token_id(value: Any) -> int | None:
    """Return an id that no computation needs: None where it is none."""
    return value if type(value) is int and 0 <= value < 2**31 else None


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
