# SPDX-License-Identifier: Apache-2.0
"""The name of tt-forge-models' `base` that loaders use."""

from abc import ABC, abstractmethod


class ForgeModel(ABC):
    _VARIANTS = {}  # noqa: RUF012
    DEFAULT_VARIANT = None

    def __init__(self, variant=None):
        self._variant = self._checked(variant)
        self._variant_config = self._VARIANTS[self._variant]

    @classmethod
    def query_available_variants(cls):
        return cls._VARIANTS

    @classmethod
    def get_model_info(cls, variant=None):
        return cls._get_model_info(cls._checked(variant))

    @classmethod
    def _checked(cls, variant):
        variant = cls.DEFAULT_VARIANT if variant is None else variant
        if variant not in cls._VARIANTS:
            raise ValueError(f"no variant {variant}")
        return variant

    @classmethod
    @abstractmethod
    def _get_model_info(cls, variant=None): ...

    @abstractmethod
    def load_model(self, **kwargs): ...

    @abstractmethod
    def load_inputs(self, **kwargs): ...
