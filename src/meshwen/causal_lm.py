# SPDX-License-Identifier: Apache-2.0
"""`CausalLM`: a model as its users hold it, with a subclass for each architecture."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike, fsdecode
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from meshwen.checkpoints import Checkpoint, open_checkpoint
from meshwen.checkpoints.generation_config import check_generation_config
from meshwen.common.arguments import brief, one_prompt, several_prompts, whole_number
from meshwen.common.choices import (
    DTYPES,
    NUMERICS,
    QUANTIZATIONS,
    Numerics,
    Quantization,
    check_choice,
)
from meshwen.engine.agreement import check_model
from meshwen.engine.cache_budget import cache_budget
from meshwen.engine.engine import Engine
from meshwen.engine.generation_config import unheeded
from meshwen.engine.request import Completion, Event, Request
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling_params import SamplingParams, with_fresh_seed
from meshwen.engine.stream import Stream
from meshwen.errors import MeshwenError
from meshwen.models.config import ModelConfig
from meshwen.parallel.distributed import to_host
from meshwen.parallel.mesh import make_mesh, mesh_label
from meshwen.parallel.plan import ParallelPlan
from meshwen.runtime.jax_settings import own_settings
from meshwen.runtime.shape_buckets import bucket
from meshwen.tokenizer.chat_template import check_template_kwargs
from meshwen.tokenizer.tokenizer import Tokenizer
from meshwen.weights.loading import Progress, dummy_params, load_params

# Text, token ids, or the messages of a conversation.
AnyPrompt = str | Iterable[int] | Sequence[Mapping[str, Any]]


class CausalLM:
    """A model on a mesh; any thread may call it at any time, and callers share one batch.

    `from_pretrained` and `from_checkpoint` return the class of the checkpoint's architecture; those
    of a subclass refuse every other architecture.

    Attributes (none can be replaced: what is compiled and running has been made from them):
        config: its hyperparameters.
        tokenizer: its tokenizer; None for a preset, which has none.
        mesh: the devices.
        plan: how the model lies on them.
        dtype: of weights, cached values, and the inputs of products with weights.
        generation_config: the checkpoint's sampling defaults, read-only.
        params: the weights, a nested dict by Hugging Face name; those that kernels multiply with,
            or int8, as `meshwen.ops.cpu.packing.PackedWeight`.
        runner: the compiled steps.
        engine: runs requests; `generate` and `stream` are short for it.
    """

    model_type: ClassVar[str | None] = None  # Of a subclass: the architecture that it is for.

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        generation_config: Mapping[str, Any],
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        prompt_lookup_num_tokens: int = 0,
    ):
        self.plan, self.dtype = runner.plan, runner.dtype
        self.config, self.mesh, self.params = runner.plan.config, runner.plan.mesh, runner.params
        self.tokenizer = tokenizer
        check_generation_config(dict(generation_config), "generation_config")
        self.generation_config = MappingProxyType(dict(generation_config))
        self._told: set[str] = set()
        self.runner = runner
        eos = _eos_token_ids(self.config, tokenizer, generation_config)
        max_num_seqs = whole_number("max_num_seqs", max_num_seqs)
        if max_model_len is not None:
            max_model_len = whole_number("max_model_len", max_model_len)
        drafts = whole_number("prompt_lookup_num_tokens", prompt_lookup_num_tokens)
        budget = cache_budget(runner, max_num_seqs, max_model_len)
        self.engine = Engine(runner, tokenizer, eos, budget, prompt_lookup_num_tokens=drafts)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuses another value for what there is: it would change nothing, or only a part."""
        if name in self.__dict__:
            raise AttributeError(
                f"{name} of a model cannot be replaced: its compiled steps and its engine were "
                "made from it; load another model"
            )
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        mesh: str | int | Mesh = "1",
        model_axes: str | Sequence[str] | None = None,
        data_axes: str | Sequence[str] | None = None,
        dtype: DTypeLike = "bfloat16",
        numerics: Numerics = "fast",
        quantization: Quantization | None = None,
        load_format: str = "auto",
        revision: str | None = None,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        prompt_lookup_num_tokens: int = 0,
        progress: Progress | None = None,
    ) -> Self:
        """Loads a model onto a mesh.

        Args:
            path_or_hub_id: a checkpoint's folder or GGUF file, a hub id, "demo" for the embedded
                demo model, or, with `load_format="dummy"`, a preset such as "qwen2.5-7b".
            mesh: a mesh string such as "1x8", a number of devices, or a JAX mesh, with axes of
                either type.
            model_axes: the axis, or axes, of a JAX mesh that split the model. None: those named
                `model` (or `model0`, `model1`, ...).
            data_axes: the axis, or axes, of a JAX mesh that split the batch. None: `data`.
            dtype: "bfloat16" or "float32", by name or as `jnp.bfloat16`, of weights, cached
                values, and the inputs of products with weights.
            numerics: "fast", or "exact" for the same bits on every mesh and in every batch: see
                `meshwen.ops.numerics.exact`.
            quantization: "int8" for weights in int8, with a scale for each 32 numbers, and with the
                extra `cpu` also what is multiplied with them: see `meshwen.ops.quant.int8`.
            load_format: "auto", "safetensors", "torch", "gguf", or "dummy" for made-up weights.
            revision: branch, tag or commit of a hub id.
            max_num_seqs: requests that run at once; fewer where memory is short.
            max_model_len: the most tokens of prompt and answer; None: the model's context.
            prompt_lookup_num_tokens: draft tokens of a step, 0 to 15, looked up in what came
                before: answers that repeat their prompt come faster. See
                `meshwen.engine.prompt_lookup`.
            progress: called with the number of weights placed, and of all.

        Raises:
            MeshwenError: there is no such model, it is not a whole checkpoint of an architecture
                that this class is for, or the mesh does not exist.
        """
        dtype = _dtype_name(dtype)
        check_choice("numerics", numerics, NUMERICS)
        if quantization is not None:
            check_choice("quantization", quantization, QUANTIZATIONS)
        if progress is not None and not callable(progress):
            raise MeshwenError(f"progress must be a function, not {brief(progress)}")
        if not isinstance(path_or_hub_id, str | PathLike):
            raise MeshwenError(f"the model must be a path or name, not {brief(path_or_hub_id)}")
        mesh = make_mesh(mesh, model_axes=model_axes, data_axes=data_axes)
        name = fsdecode(path_or_hub_id)
        with open_checkpoint(name, load_format=load_format, revision=revision) as checkpoint:
            cls._class_for(checkpoint)  # Refuses another architecture before anything is loaded.
            for note in checkpoint.notes:
                warnings.warn(f"{name}: {note}", stacklevel=2)
            return cls.from_checkpoint(
                checkpoint,
                Tokenizer.from_checkpoint(checkpoint),
                mesh=mesh,
                dtype=dtype,
                numerics=numerics,
                quantization=quantization,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                prompt_lookup_num_tokens=prompt_lookup_num_tokens,
                progress=progress or (lambda done, total: None),
            )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | None,
        *,
        mesh: Mesh,
        dtype: str = "bfloat16",
        numerics: Numerics = "fast",
        quantization: Quantization | None = None,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        prompt_lookup_num_tokens: int = 0,
        progress: Progress = lambda done, total: None,
    ) -> Self:
        """Loads an open checkpoint onto a mesh: the second half of `from_pretrained`.

        A checkpoint that was opened without weights gets made-up ones. It may be closed afterwards.
        """
        model_class, kind = cls._class_for(checkpoint), jnp.dtype(dtype)
        plan = ParallelPlan(checkpoint.config, make_mesh(mesh), numerics, quantization)
        settings = {
            "mesh": mesh_label(plan.mesh),
            "dtype": str(kind),
            "numerics": numerics,
            "quantization": quantization,
            "format": "dummy" if checkpoint.format is None else "files",
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "prompt_lookup_num_tokens": prompt_lookup_num_tokens,
        }
        check_model(checkpoint, tokenizer, settings, exact=plan.exact)
        if checkpoint.format is None:
            params = dummy_params(plan, kind, progress)
        else:
            params = load_params(checkpoint, plan, kind, progress)
        runner = ModelRunner(plan, params, kind)
        return model_class(
            runner,
            tokenizer,
            checkpoint.generation_config,
            max_num_seqs,
            max_model_len,
            prompt_lookup_num_tokens,
        )

    @classmethod
    def _class_for(cls, checkpoint: Checkpoint) -> type[Self]:
        """The class of a checkpoint's architecture. Raises MeshwenError where this is another."""
        config = checkpoint.config
        if cls is CausalLM:  # An architecture may have no class of its own.
            return cast(type[Self], _CLASSES.get(config.model_type, CausalLM))
        if cls.model_type not in (None, config.model_type):
            raise MeshwenError(
                f"{checkpoint.path or checkpoint.name} is a {config.model_type} model: load it "
                f"with {config.architecture} or AutoModelForCausalLM, not {cls.__name__}"
            )
        return cls

    @own_settings()
    def __call__(self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None) -> Array:
        """Logits of every position.

        All at once: without kernels for the attention, memory grows with the square of the
        sequence, for scores float32 [batch, heads, sequence, sequence]; and where padding stands
        before sequences, logits are there twice. The vocabulary of the result is split over the
        mesh where `vocab_size` divides by it; elsewhere every device gets a copy. Where the mesh
        spans several processes, all of them call this, and each gets a copy of its own.

        Args:
            input_ids: int [batch, sequence].
            attention_mask: int or bool [batch, sequence], 0 at padding, on either side; logits at
                padding mean nothing. None: no padding.

        Returns:
            float32 [batch, sequence, vocab_size].

        Raises:
            MeshwenError: the ids are not a batch, or one is outside the vocabulary.
        """
        ids = _array("input_ids", input_ids)
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise MeshwenError(
                f"input_ids must be int [batch, sequence], not {ids.dtype} {ids.shape}"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise MeshwenError(
                f"input_ids must be from 0 to {self.config.vocab_size - 1}, but one is {wrong}"
            )
        if attention_mask is None:
            attention_mask = np.ones_like(ids)
        mask = _array("attention_mask", attention_mask)
        if mask.dtype.kind not in "biuf":
            raise MeshwenError(f"attention_mask must be int or bool, not {mask.dtype}")
        if mask.shape != ids.shape:
            raise MeshwenError(
                f"attention_mask {mask.shape} must have the shape {ids.shape} of input_ids"
            )
        mask = mask != 0
        longest = mask.sum(axis=1).max()
        if longest > self.config.context_length:
            raise MeshwenError(
                f"input_ids has a sequence of {longest} tokens, but the model's "
                f"context is {self.config.context_length} tokens"
            )
        batch, length = ids.shape
        # Rows to divide by the mesh; tokens to a bucket, so that few lengths are compiled.
        extra = ((0, -batch % self.plan.data_devices), (0, bucket(length) - length))
        # Padding behind what it pads: no token sees it there, and sequences begin at position 0.
        order = np.argsort(~mask, axis=1, kind="stable")
        ids = np.pad(np.take_along_axis(ids, order, axis=1), extra).astype(np.int32)
        with self.engine.exclusive():
            logits = self.runner.logits(ids)[:batch, :length, : self.config.vocab_size]
            if (np.diff(order, axis=1) != 1).any():
                logits = jnp.take_along_axis(logits, order.argsort(axis=1)[..., None], axis=1)
            return logits if logits.is_fully_addressable else jnp.asarray(to_host(logits))

    def generate(self, prompts: Any, **sampling: Any) -> list[Completion]:
        """Continues prompts.

        Args:
            prompts: one prompt or several, each text (taken as it is), token ids (a list or an
                array), or a conversation, a list of `{"role": ..., "content": ...}`, which goes
                through the chat template.
            sampling: fields of `SamplingParams`; what is not given is the checkpoint's default.
                Also `chat_template_kwargs`, further variables for the chat template of
                conversations, such as `{"enable_thinking": False}`.
                Without a `seed`, whatever is drawn is drawn anew for each prompt and call; the
                completion has the seed. (Over several processes, which must draw alike, it is 0.)

        Returns:
            One completion a prompt, in order.

        Raises:
            MeshwenError: a prompt is empty or too long, a value is impossible, or the model's
                logits are NaN or infinite (`engine.run` still gives the other answers).
        """
        several = several_prompts(prompts)
        # An iterator has its items once, and every prompt needs them.
        sampling = {k: list(v) if isinstance(v, Iterator) else v for k, v in sampling.items()}
        with self.engine.run([self.request(prompt, **sampling) for prompt in several]) as events:
            done = {e.request: e.completion for e in events if e.completion is not None}
        for number, completion in sorted(done.items()):
            if completion.error is not None:
                raise MeshwenError(f"prompt {number + 1}: {completion.error}")
        return [done[number] for number in range(len(several))]

    def stream(self, prompt: AnyPrompt, **sampling: Any) -> Stream[str]:
        """Continues one prompt, and yields the text as it comes, whole characters at a time.

        With `async for`, the event loop goes on while a step runs. Takes and raises what `generate`
        does.
        """
        events = self.events(prompt, **sampling)
        errors: list[str] = []
        return Stream(lambda: _next_text(events, errors), events.close)

    def events(self, prompt: AnyPrompt, **sampling: Any) -> Stream[Event]:
        """As `stream`, but yields every token with its text, and errors as completions."""
        return self.engine.run([self.request(prompt, **sampling)])

    def request(
        self,
        prompt: AnyPrompt,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Request:
        """A request to the engine, with the checkpoint's sampling defaults.

        What would change tokens and is not heeded of them is told once, as a warning.
        """
        variables = check_template_kwargs(chat_template_kwargs or {})
        params = SamplingParams.from_generation_config(self.generation_config, **sampling)
        if sampling.get("seed") is None and not self.mesh.is_multi_process:
            params = with_fresh_seed(params)
        lost = unheeded(self.generation_config, greedy=params.temperature == 0)
        if lost and lost not in self._told:
            self._told.add(lost)
            warnings.warn(f"generation_config: {lost}", stacklevel=2)
        given = one_prompt(prompt)
        if variables and isinstance(given, tuple | str):
            raise MeshwenError(
                "chat_template_kwargs are for conversations, and this prompt is "
                f"{'text' if isinstance(given, str) else 'token ids'}: leave them out"
            )
        if isinstance(given, tuple):
            return Request(given, params)
        if self.tokenizer is None:
            raise MeshwenError("this model has no tokenizer: give prompts as token ids")
        if isinstance(given, str):
            return Request(tuple(self.tokenizer.encode(given)), params)
        return Request(tuple(self.tokenizer.encode_chat(given, **variables)), params)


class Qwen2ForCausalLM(CausalLM):
    """A Qwen2 or Qwen2.5 model."""

    model_type = "qwen2"


_CLASSES: dict[str | None, type[CausalLM]] = {one.model_type: one for one in (Qwen2ForCausalLM,)}


class AutoModelForCausalLM:
    """Loads a model of any architecture, as the class for it."""

    from_pretrained = staticmethod(CausalLM.from_pretrained)
    from_checkpoint = staticmethod(CausalLM.from_checkpoint)


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise MeshwenError(f"{name} must have rows of one length: {error}") from None


def _dtype_name(dtype: DTypeLike) -> str:
    """A dtype's name: of JAX's, numpy's and torch's types too."""
    name = dtype
    if not isinstance(dtype, str):
        try:
            name = jnp.dtype(dtype).name
        except TypeError:
            name = str(dtype).removeprefix("torch.")
    if dtype is None or name not in DTYPES:
        raise MeshwenError(f"dtype {brief(dtype)} is not one of {', '.join(DTYPES)}")
    return str(name)


def _next_text(events: Iterable[Event], errors: list[str]) -> str | None:
    """The next piece of text; `errors` keeps what is to be raised after the last one."""
    for event in events:
        if event.completion is not None and event.completion.error is not None:
            errors.append(event.completion.error)
        if event.text:
            return event.text
    if errors:
        raise MeshwenError(errors.pop())
    return None


def _eos_token_ids(
    config: ModelConfig, tokenizer: Tokenizer | None, generation_config: Mapping[str, Any]
) -> tuple[int, ...]:
    """The tokens that end an answer: the first source that names any, as in transformers."""
    given = generation_config.get("eos_token_id")
    if isinstance(given, int):
        return (given,)
    return tuple(given or config.eos_token_id or (tokenizer.eos_token_ids if tokenizer else ()))
