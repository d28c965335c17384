# SPDX-License-Identifier: Apache-2.0
"""The names of tt-forge-models' `config` that loaders use."""

from dataclasses import dataclass
from enum import Enum


class StrEnum(Enum):
    def __str__(self):
        return self.value


class ModelGroup(StrEnum):
    GENERALITY = "generality"


class ModelTask(StrEnum):
    NLP_CAUSAL_LM = "nlp_causal_lm"


class ModelSource(StrEnum):
    CUSTOM = "custom"


class Framework(StrEnum):
    JAX = "jax"


class Parallelism(StrEnum):
    SINGLE_DEVICE = "single_device"
    DATA_PARALLEL = "data_parallel"
    TENSOR_PARALLEL = "tensor_parallel"


@dataclass(frozen=True)
class ModelInfo:
    model: str
    variant: StrEnum
    group: ModelGroup
    task: ModelTask
    source: ModelSource
    framework: Framework


@dataclass
class LLMModelConfig:
    pretrained_model_name: str
    max_length: int | None = None
