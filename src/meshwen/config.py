# SPDX-License-Identifier: Apache-2.0
"""The model's hyperparameters, from a Hugging Face ``config.json`` or a named preset.

Field names and meanings are those of transformers' ``Qwen2Config``. The spellings of transformers 4
(``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``, ``dtype``) are both
read. What this package cannot run exactly is refused, never guessed.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from meshwen.errors import MeshwenError
from meshwen.json_files import read_json, shown
from meshwen.paths import exists, user_path

ARCHITECTURE = "Qwen2ForCausalLM"
MODEL_TYPE = "qwen2"
ROPE_TYPES = ("default", "linear", "yarn")
DTYPES = ("float32", "bfloat16", "float16")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining context; see ``meshwen.rope``.

    ``rope_type`` is ``linear`` or ``yarn``. The fields from ``original_max_position_embeddings`` on
    belong to YaRN. ``attention_factor`` None means: computed from ``factor`` (and ``mscale``).
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Raise MeshwenError when the settings contradict themselves."""
        if self.rope_type not in ("linear", "yarn"):
            raise MeshwenError(
                f"rope_type {self.rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        if self.factor < 1.0:
            raise MeshwenError(f"the RoPE scaling factor must be at least 1, found {self.factor}")
        if self.rope_type == "yarn":
            context = self.original_max_position_embeddings
            if context is None or context < 1:
                raise MeshwenError(f"YaRN needs original_max_position_embeddings, found {context}")
            if self.attention_factor is not None and self.attention_factor <= 0:
                raise MeshwenError(
                    f"attention_factor must be above 0, found {self.attention_factor}"
                )
            if not self.beta_fast >= self.beta_slow > 0:
                raise MeshwenError(
                    f"YaRN needs beta_fast >= beta_slow > 0, found {self.beta_fast} and "
                    f"{self.beta_slow}"
                )


@dataclass(frozen=True, kw_only=True)
class Qwen2Config:
    """Hyperparameters of one Qwen2.5 model; hashable, so that it can be a static argument of jit.

    ``head_dim`` 0 means ``hidden_size // num_attention_heads`` and empty ``layer_types`` means full
    attention in every layer; both are filled in at construction, so readers always see the value.
    ``sliding_window`` (tokens a query may see, itself included) is None when no layer may slide.
    ``torch_dtype`` is the type the checkpoint was written in. ``name`` is only for people: configs
    that differ in nothing else are equal.

    Raises MeshwenError at construction when the values contradict each other.
    """

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
        for key in _POSITIVE:
            if getattr(self, key) < 1:
                raise MeshwenError(f"{key} must be at least 1, found {getattr(self, key)}")
        self._check_heads()
        self._check_layers()
        if not self.rms_norm_eps > 0:
            raise MeshwenError(f"rms_norm_eps must be above 0, found {self.rms_norm_eps}")
        if not self.rope_theta > 1:
            raise MeshwenError(f"rope_theta must be above 1, found {self.rope_theta}")
        if self.torch_dtype not in DTYPES:
            raise MeshwenError(
                f"dtype {self.torch_dtype!r} is not supported; supported: {', '.join(DTYPES)}"
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
            raise MeshwenError(f"rotary embeddings need an even head_dim, found {self.head_dim}")

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
                f"layer type {unknown[0]!r} is not supported; supported: {', '.join(LAYER_TYPES)}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise MeshwenError(f"sliding_window must be at least 1, found {self.sliding_window}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise MeshwenError(
                "layer_types has sliding_attention, but use_sliding_window is false or "
                "sliding_window is not set"
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
        path = user_path(path)
        folder = exists(path) and path.is_dir()
        file = path / "config.json" if folder else path
        if not exists(file):
            if folder:
                raise MeshwenError(f"{path}: the folder has no config.json")
            raise MeshwenError(f"{path}: no such file or folder")
        data = read_json(file, dict[str, Any])
        try:
            return cls.from_dict(data, name=file.resolve().parent.name)
        except MeshwenError as error:
            raise MeshwenError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, name: str | None = None) -> Self:
        """Build a config from the contents of a ``config.json``.

        Keys that do not change the forward pass (``use_cache``, ``initializer_range``, ...) are
        ignored. ``name`` defaults to ``_name_or_path``.

        Raises MeshwenError: another architecture, a missing key, a value of the wrong type, a
        quantised checkpoint, or a setting the model does not implement.
        """
        if not isinstance(data, Mapping):
            raise MeshwenError(f"a config must be a JSON object, found {shown(data)}")
        _refuse_unsupported(data)
        layers = _int(data, "num_hidden_layers")
        heads = _int(data, "num_attention_heads")
        max_positions = _max_positions(data)
        sliding_window, layer_types = _sliding_attention(data, layers)
        rope_theta, rope_scaling = _rope(data, max_positions)
        return cls(
            vocab_size=_int(data, "vocab_size"),
            hidden_size=_int(data, "hidden_size"),
            intermediate_size=_int(data, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_nullable(_int, data, "num_key_value_heads", heads),
            head_dim=_optional(_int, data, "head_dim", 0),
            max_position_embeddings=max_positions,
            rms_norm_eps=_float(data, "rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=_bool(data, "tie_word_embeddings", default=False),
            layer_types=layer_types,
            sliding_window=sliding_window,
            bos_token_id=_optional(_int, data, "bos_token_id"),
            eos_token_id=_token_ids(data, "eos_token_id"),
            pad_token_id=_optional(_int, data, "pad_token_id"),
            torch_dtype=_dtype(data),
            name=name if name is not None else str(data.get("_name_or_path") or ""),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a ``config.json`` that transformers and this class read."""
        data = {key: value for key, value in asdict(self).items() if key != "name"}
        sliding = [i for i, kind in enumerate(self.layer_types) if kind == "sliding_attention"]
        eos = list(self.eos_token_id)
        data.update(
            architectures=[ARCHITECTURE],
            model_type=MODEL_TYPE,
            hidden_act="silu",
            layer_types=list(self.layer_types),
            use_sliding_window=self.sliding_window is not None,
            max_window_layers=sliding[0] if sliding else self.num_hidden_layers,
            eos_token_id=(eos[0] if len(eos) == 1 else eos) if eos else None,
            rope_scaling=_rope_scaling_dict(self.rope_scaling),
        )
        return data


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    """Raise MeshwenError for a config whose model would not be the one this package computes."""
    found = data.get("architectures") or []
    model_type = data.get("model_type")
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise MeshwenError(f"architectures must be a list of names, found {shown(found)}")
    if (found and ARCHITECTURE not in found) or model_type not in (None, MODEL_TYPE):
        raise MeshwenError(
            f"architecture {', '.join(found) or 'unnamed'} (model_type {model_type!r}) is not "
            f"supported; supported: {ARCHITECTURE} (model_type {MODEL_TYPE!r})"
        )
    if not found and model_type is None:
        raise MeshwenError(
            f"neither architectures nor model_type is given; supported: {ARCHITECTURE} "
            f"(model_type {MODEL_TYPE!r})"
        )
    quantization = data.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise MeshwenError(
            f"unknown quantisation {method or 'unnamed'!r} (quantization_config); use "
            "the unquantised checkpoint or a GGUF file"
        )
    activation = data.get("hidden_act", "silu")
    if activation != "silu":
        raise MeshwenError(f"hidden_act {activation!r} is not supported; supported: 'silu'")
    if data.get("is_causal", True) is not True:
        raise MeshwenError("is_causal false (bidirectional attention) is not supported")


def _sliding_attention(data: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[str, ...]]:
    """Return (sliding_window, layer_types) by the rule of transformers' Qwen2Config.

    The first ``max_window_layers`` layers attend to everything and the ones above slide, unless
    ``layer_types`` says which do.
    """
    window = None
    if _bool(data, "use_sliding_window", default=False):
        window = _nullable(_int, data, "sliding_window", None)
    given = data.get("layer_types")
    if given is not None:
        if not isinstance(given, list | tuple) or not all(isinstance(item, str) for item in given):
            raise MeshwenError(f"layer_types must be a list of names, found {shown(given)}")
        if not given:
            raise MeshwenError("layer_types is empty; leave it out or give one entry per layer")
        return window, tuple(given)
    if window is None:
        return None, ()
    full = min(max(_int(data, "max_window_layers"), 0), layers)
    return window, LAYER_TYPES[:1] * full + LAYER_TYPES[1:] * (layers - full)


def _max_positions(data: Mapping[str, Any]) -> int:
    """Return the context length; without dual chunk attention, the one before its extension.

    Qwen2.5-1M checkpoints declare 1010000 positions but reach beyond 262144 only by dual chunk
    attention (arXiv 2402.17463), which is plain attention up to there and not implemented here.
    """
    positions = _int(data, "max_position_embeddings")
    dual_chunk = data.get("dual_chunk_attention_config")
    if not isinstance(dual_chunk, Mapping):
        return positions
    return min(positions, _int(dual_chunk, "original_max_position_embeddings"))


def _rope(data: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Return (rope_theta, scaling); as in transformers, a filled rope_scaling wins."""
    key = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope = data.get(key) or {}
    if not isinstance(rope, Mapping):
        raise MeshwenError(f"{key} must be an object, found {shown(rope)}")
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise MeshwenError(f"{key}.{nested[0]}: RoPE settings per layer type are not supported")
    for source in (rope, data):
        if source.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            raise MeshwenError("partial_rotary_factor other than 1 is not supported")
    theta = _float(rope if rope.get("rope_theta") is not None else data, "rope_theta")

    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type not in ROPE_TYPES:
        raise MeshwenError(
            f"{key}: rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if rope_type == "linear":
        return theta, RopeScaling(rope_type="linear", factor=_float(rope, "factor"))
    return theta, _yarn(rope, data, max_positions)


def _yarn(rope: Mapping[str, Any], data: Mapping[str, Any], max_positions: int) -> RopeScaling:
    """Read YaRN's settings with transformers' defaults."""
    # A model-wide value takes priority, then YaRN's own.
    source = data if data.get("original_max_position_embeddings") is not None else rope
    original = _optional(_int, source, "original_max_position_embeddings", max_positions)
    return RopeScaling(
        rope_type="yarn",
        factor=_nullable(_float, rope, "factor", max_positions / max(original, 1)),
        original_max_position_embeddings=original,
        beta_fast=_optional(_float, rope, "beta_fast") or 32.0,
        beta_slow=_optional(_float, rope, "beta_slow") or 1.0,
        attention_factor=_optional(_float, rope, "attention_factor"),
        mscale=_optional(_float, rope, "mscale"),
        mscale_all_dim=_optional(_float, rope, "mscale_all_dim"),
        truncate=_bool(rope, "truncate", default=True),
    )


def _rope_scaling_dict(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return the ``rope_scaling`` object of config.json: only what the RoPE type knows."""
    if scaling is None:
        return None
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {key: value for key, value in asdict(scaling).items() if value is not None}


def _dtype(data: Mapping[str, Any]) -> str:
    """Return the checkpoint's dtype; both keys present: ``dtype`` wins, as in transformers."""
    value = data.get("dtype") or data.get("torch_dtype") or "float32"
    if not isinstance(value, str):
        raise MeshwenError(f"torch_dtype must be a name, found {shown(value)}")
    return value.removeprefix("torch.")


def _token_ids(data: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = data.get(key)
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise MeshwenError(f"{key} must be an integer or a list of them, found {shown(value)}")
    return tuple(ids)


_Reader = Callable[[Mapping[str, Any], str], Any]


def _require(data: Mapping[str, Any], key: str) -> Any:
    if key not in data:
        raise MeshwenError(f"required key {key} is missing")
    return data[key]


def _int(data: Mapping[str, Any], key: str) -> int:
    value = _require(data, key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**31:
        raise MeshwenError(f"{key} must be a 32-bit integer, found {shown(value)}")
    return value


def _float(data: Mapping[str, Any], key: str) -> float:
    value = _require(data, key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -1e300 < value < 1e300:
        raise MeshwenError(f"{key} must be a finite number, found {shown(value)}")
    return float(value)


def _bool(data: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise MeshwenError(f"{key} must be true or false, found {shown(value)}")
    return value


def _nullable(read: _Reader, data: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return the value of a required key, or the default where the config says null."""
    return default if _require(data, key) is None else read(data, key)


def _optional(read: _Reader, data: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return the value of a key, or the default where it is missing or null."""
    return default if data.get(key) is None else read(data, key)
