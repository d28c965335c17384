# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5 for causal language modelling, tensor-parallel, as meshwen's Flax linen module.

What is loaded may be chosen from outside, where the hub cannot be reached or a size is enough:

- MESHWEN_CHECKPOINT: a folder, a GGUF file, a hub id or "demo", in the place of the variant's;
- MESHWEN_LOAD_FORMAT=dummy: random weights, of the variant's size or of MESHWEN_CHECKPOINT's;
- MESHWEN_DTYPE: float32 or bfloat16, of the weights.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from meshwen.checkpoints import open_checkpoint
from meshwen.flax import FlaxQwen25ForCausalLM
from meshwen.tokenizer.tokenizer import Tokenizer

from ....base import ForgeModel
from ....config import (
    Framework,
    LLMModelConfig,
    ModelGroup,
    ModelInfo,
    ModelSource,
    ModelTask,
    StrEnum,
)

_TEXT = "Give me a short introduction to large language models."
_DUMMY_TOKENS = 16


class ModelVariant(StrEnum):
    """Sizes of Qwen2.5."""

    QWEN_2_5_0_5B = "0.5B"
    QWEN_2_5_0_5B_INSTRUCT = "0.5B_Instruct"
    QWEN_2_5_1_5B = "1.5B"
    QWEN_2_5_1_5B_INSTRUCT = "1.5B_Instruct"
    QWEN_2_5_3B = "3B"
    QWEN_2_5_3B_INSTRUCT = "3B_Instruct"
    QWEN_2_5_7B = "7B"
    QWEN_2_5_7B_INSTRUCT = "7B_Instruct"
    QWEN_2_5_14B = "14B"
    QWEN_2_5_14B_INSTRUCT = "14B_Instruct"
    QWEN_2_5_32B = "32B"
    QWEN_2_5_32B_INSTRUCT = "32B_Instruct"
    QWEN_2_5_72B = "72B"
    QWEN_2_5_72B_INSTRUCT = "72B_Instruct"


class ModelLoader(ForgeModel):
    """Qwen2.5 on one device, or split over the devices of a mesh axis.

    Args:
        variant: a size; None: 0.5B.
        checkpoint: in the place of MESHWEN_CHECKPOINT.
        load_format: "auto" or "dummy", in the place of MESHWEN_LOAD_FORMAT.
        dtype: in the place of MESHWEN_DTYPE; without either, bfloat16.
    """

    _VARIANTS = {  # noqa: RUF012
        variant: LLMModelConfig(
            pretrained_model_name=f"Qwen/Qwen2.5-{variant.value.replace('_', '-')}",
            max_length=512,
        )
        for variant in ModelVariant
    }
    DEFAULT_VARIANT = ModelVariant.QWEN_2_5_0_5B

    def __init__(self, variant=None, *, checkpoint=None, load_format=None, dtype=None):
        super().__init__(variant)
        load_format = load_format or os.environ.get("MESHWEN_LOAD_FORMAT", "auto")
        if load_format not in ("auto", "dummy"):
            raise ValueError(f"MESHWEN_LOAD_FORMAT must be auto or dummy, not {load_format!r}")
        self._dummy = load_format == "dummy"
        self._dtype = dtype or os.environ.get("MESHWEN_DTYPE", "bfloat16")
        self._checkpoint = checkpoint or os.environ.get("MESHWEN_CHECKPOINT") or self._published()
        self._train, self._variables = False, None

    @classmethod
    def _get_model_info(cls, variant=None):
        return ModelInfo(
            model="Qwen 2.5",
            variant=variant,
            group=ModelGroup.GENERALITY,
            task=ModelTask.NLP_CAUSAL_LM,
            source=ModelSource.CUSTOM,
            framework=Framework.JAX,
        )

    def _published(self):
        """The variant's hub id; its size alone where weights are dummies, without a download."""
        if self._dummy:
            return f"qwen2.5-{self._variant.value.split('_')[0].lower()}"
        return self._variant_config.pretrained_model_name

    # One device: their DynamicJaxModelTester.

    def load_model(self, *, dtype_override=None, **kwargs):
        """The module for one device."""
        return self.load_multichip_model(num_devices=1, dtype_override=dtype_override)

    def load_inputs(self, dtype_override=None, mesh=None):
        """Token ids of a sentence, int32 [1, T], the same on every mesh.

        Args:
            dtype_override: of numbers, of which there are none here.
            mesh: splits the model, not the batch.
        """
        load_format = "dummy" if self._dummy else "auto"
        with open_checkpoint(self._checkpoint, load_format=load_format) as checkpoint:
            tokenizer = None if self._dummy else Tokenizer.from_checkpoint(checkpoint)
            if tokenizer is not None:
                ids = tokenizer.encode(_TEXT)[: self._variant_config.max_length]
            else:
                ids = [(7919 * i + 1) % checkpoint.config.vocab_size for i in range(_DUMMY_TOKENS)]
        return jax.device_put(np.array([ids], np.int32), jax.devices("cpu")[0])

    def get_input_parameters(self, train=False):
        """The module's variables on the first CPU."""
        self._train, self._variables = train, self.load_parameters(train=train)
        return self._variables

    def get_forward_method_name(self):
        """Of a linen module."""
        return "apply"

    def get_forward_method_args(self):
        """Variables, and token ids unless in training.

        Their tester differentiates by all arguments that are not static, and cannot compare
        gradients of integers. It asks for `get_input_parameters` first, which says what for.
        """
        return [self._variables] if self._train else [self._variables, self.load_inputs()]

    def get_forward_method_kwargs(self, train=False):
        """In training, the token ids."""
        return {"input_ids": self.load_inputs()} if train else {}

    def get_static_argnames(self):
        """In training, the token ids."""
        return ["input_ids"] if self._train else []

    # A mesh: their DynamicJaxMultiChipModelTester.

    def load_multichip_model(
        self, axis_name="X", num_devices=2, train_mode=False, dtype_override=None
    ):
        """The module for each device of a mesh axis; its logits are whole on every device.

        Args:
            axis_name: the axis that splits the model.
            num_devices: of that axis; any number.
            train_mode: changes nothing: the model has no dropout.
            dtype_override: of the weights.
        """
        return FlaxQwen25ForCausalLM.for_model(
            self._checkpoint,
            axis_name=axis_name,
            num_devices=num_devices,
            param_dtype=dtype_override or self._dtype,
        )

    def get_input_activations_partition_spec(self, mesh, axis_name="X", parallelism=None):
        """That of the token ids, which every device gets.

        Raises ValueError for data parallelism, which the module, being told its devices before the
        kind of parallelism, does not have.
        """
        devices = mesh.shape[axis_name]
        if devices > 1 and getattr(parallelism, "name", None) == "DATA_PARALLEL":
            raise ValueError("this loader splits the model: run it tensor-parallel")
        return (PartitionSpec(),)

    def load_parameters_partition_spec(
        self,
        model_for_multichip=None,
        cpu_mesh=None,
        input_activations_partition_specs=None,
        inputs=None,
        dtype_override=None,
        parallelism=None,
    ):
        """Partition specs of the module's variables, one for each array."""
        model = model_for_multichip or self.load_model(dtype_override=dtype_override)
        return model.partition_specs()

    def load_parameters(
        self,
        dtype_override=None,
        train=False,
        seed=None,
        inputs=None,
        model_for_multichip=None,
        cpu_mesh=None,
        input_activations_partition_specs=None,
        input_parameters_partition_specs=None,
    ):
        """The module's variables on the CPU mesh, padded and split for its devices.

        Args:
            dtype_override: of the weights.
            model_for_multichip: the module; None: that for one device.
            cpu_mesh: its mesh; None: the first CPU.
            train, seed, inputs, the specs: change nothing.
        """
        model = model_for_multichip or self.load_model()
        if dtype_override is not None:
            model = model.clone(param_dtype=jnp.dtype(dtype_override))
        if cpu_mesh is None:
            cpu_mesh = Mesh(np.array(jax.devices("cpu")[:1]), (model.axis_name,))
        return model.load_parameters(None if self._dummy else self._checkpoint, cpu_mesh)
