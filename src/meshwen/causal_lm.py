# SPDX-License-Identifier: Apache-2.0
"""`CausalLM`: a model as its users hold it, with a subclass for each architecture."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike, fsdecode
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, Unpack, cast

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from meshwen.checkpoints import Checkpoint, open_checkpoint
from meshwen.checkpoints.generation_config import check_generation_config
from meshwen.checkpoints.writing import write_checkpoint
from meshwen.common.arguments import brief, several_prompts, truth
from meshwen.common.json_files import to_json
from meshwen.common.option_fields import check_names, documented
from meshwen.common.units import bytes_number
from meshwen.engine.agreement import check_model
from meshwen.engine.engine import Engine
from meshwen.engine.options import EngineKeywords, EngineOptions
from meshwen.engine.prompt_lookup import PromptLookup
from meshwen.engine.prompts import AnyPrompt, Prompts
from meshwen.engine.request import Completion, Event, Request
from meshwen.engine.runner import ModelRunner
from meshwen.engine.sampling_params import SamplingParams
from meshwen.engine.speculation import Speculation
from meshwen.engine.stream import Stream
from meshwen.engine.token_batch import TokenBatch
from meshwen.errors import MeshwenError
from meshwen.parallel.distributed import to_host
from meshwen.parallel.mesh import mesh_label
from meshwen.runtime.jax_settings import own_settings
from meshwen.tokenizer.tokenizer import Tokenizer
from meshwen.weights.loading import Progress, dummy_params, load_params
from meshwen.weights.saving import held_tensors


class CausalLM:
    """A model on a mesh; any thread may call it at any time, and callers share one batch.

    `from_pretrained` and `from_checkpoint` return the class of the checkpoint's architecture; those
    of a subclass refuse every other architecture.

    Attributes (none can be replaced: what is compiled and running has been made from them):
        config: its hyperparameters.
        tokenizer: its tokenizer; None for a preset, which has none.
        mesh: the devices.
        plan: how the model lies on them.
        dtype: of weights, cached values, and the inputs of matmuls with weights.
        generation_config: the checkpoint's sampling defaults, read-only.
        params: the weights, a nested dict by Hugging Face name, each a
            `meshwen.ops.weight.Weight`.
        runner: the compiled steps.
        engine: runs requests; `generate` and `stream` are short for it.
    """

    model_type: ClassVar[str | None] = None  # Of a subclass: the architecture that it is for.

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        generation_config: Mapping[str, Any],
        options: EngineOptions = EngineOptions(),
    ):
        self.plan, self.dtype = runner.plan, runner.dtype
        self.config, self.mesh, self.params = runner.config, runner.plan.mesh, runner.params
        self.tokenizer = tokenizer
        check_generation_config(dict(generation_config), "generation_config")
        self.generation_config = MappingProxyType(dict(generation_config))
        self._prompts = Prompts(
            tokenizer, self.generation_config, fresh_seeds=not self.mesh.is_multi_process
        )
        self.runner = runner
        self.engine = Engine(
            runner,
            tokenizer,
            self._eos_token_ids(),
            options.cache_plan(runner.model),
            max_num_batched_tokens=options.max_num_batched_tokens,
            prefix_caching=options.prefix_caching,
            speculation=Speculation(PromptLookup(), options.prompt_lookup_num_tokens),
        )

    def __setattr__(self, name: str, value: object) -> None:
        """Refuses another value for what there is: it would change nothing, or only a part."""
        if name in self.__dict__:
            raise AttributeError(
                f"{name} of a model cannot be replaced: its compiled steps and its engine were "
                "made from it; load another model"
            )
        super().__setattr__(name, value)

    @classmethod
    @documented(EngineOptions, "Options, with their defaults")
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        progress: Progress | None = None,
        **options: Unpack[EngineKeywords],
    ) -> Self:
        """Loads a model onto a mesh.

        Args:
            path_or_hub_id: a checkpoint's folder or GGUF file, a hub id, "demo" for the embedded
                demo model, or, with `load_format="dummy"`, a preset such as "qwen2.5-7b".
            progress: called with the number of weights placed, and of all.
            options: fields of `meshwen.engine.options.EngineOptions`, listed below.

        Raises:
            MeshwenError: there is no such model, it is not a whole checkpoint of an architecture
                that this class is for, an option has an impossible value, or the mesh does not
                exist.
        """
        check_names("option", options, EngineOptions)
        engine = EngineOptions(**options)
        if progress is not None and not callable(progress):
            raise MeshwenError(f"progress must be a function, not {brief(progress)}")
        if not isinstance(path_or_hub_id, str | PathLike):
            raise MeshwenError(f"the model must be a path or name, not {brief(path_or_hub_id)}")
        mesh = engine.make_mesh()  # Refuses what does not exist before a checkpoint is looked for.
        name, formats = fsdecode(path_or_hub_id), engine.load_format
        with open_checkpoint(name, load_format=formats, revision=engine.revision) as checkpoint:
            cls._class_for(checkpoint)  # Refuses another architecture before anything is loaded.
            for note in checkpoint.notes:
                warnings.warn(f"{name}: {note}", stacklevel=2)
            tokenizer = Tokenizer.from_checkpoint(checkpoint)
            return cls._load(checkpoint, tokenizer, engine, progress, mesh)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | None,
        options: EngineOptions = EngineOptions(),
        progress: Progress | None = None,
    ) -> Self:
        """Loads an open checkpoint onto a mesh: the second half of `from_pretrained`.

        A checkpoint that was opened without weights gets dummy ones. It may be closed afterwards.
        """
        return cls._load(checkpoint, tokenizer, options, progress)

    @classmethod
    def _load(
        cls,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer | None,
        options: EngineOptions,
        progress: Progress | None,
        mesh: Mesh | None = None,
    ) -> Self:
        """As `from_checkpoint`, on a mesh that was made of the options; None: make it."""
        model_class = cls._class_for(checkpoint)
        model = options.parallel_model(checkpoint.config, mesh)
        compared = options.compared() | {
            "mesh": mesh_label(model.mesh),
            "weights": "dummy" if checkpoint.format is None else "files",
        }
        check_model(checkpoint, tokenizer, compared, exact=model.numerics == "exact")
        options.longest_sequence(checkpoint.config)  # Refuses a wrong one before weights are read.
        progress = progress or (lambda done, total: None)
        if checkpoint.format is None:
            params = dummy_params(model.weights, progress)
        else:
            params = load_params(checkpoint, model.weights, progress)
        runner = ModelRunner(model, params)
        return model_class(runner, tokenizer, checkpoint.generation_config, options)

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

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
    ) -> None:
        """Writes the model as a checkpoint folder that this package and transformers load.

        `config.json`, `generation_config.json`, the tokenizer's files and safetensors, under
        Hugging Face's names: whatever the mesh, without its padding and copies. Loaded with the
        same options it gives the same bits. Beside the model, one weight at a time is in memory.
        Hugging Face's layout has no int8 as it is here: such a model is written as float32 numbers
        that are quantised to the same int8, which a warning says. A tied output head is quantised
        anew of the embedding table, so it may differ where loading rounded the table.

        Args:
            folder: made if it is missing.
            max_shard_size: of a file of weights: bytes, or text such as "5GB" or "500MiB".
            overwrite: replace the files of a checkpoint in the folder; other files stay.

        Raises:
            MeshwenError: the folder has files of a checkpoint, or other weights, also with
                `overwrite`; it cannot be written (then nothing is left of it); or the mesh spans
                several processes.
        """
        most = bytes_number("max_shard_size", max_shard_size)
        if self.mesh.is_multi_process:
            raise MeshwenError(
                "each process holds a part of the weights: load the model in one process to save it"
            )
        tensors = held_tensors(self.params, self.runner.model.weights)
        [dtype] = {tensor.dtype.name for tensor in tensors.values()}
        if quantization := self.runner.model.quantization:
            warnings.warn(
                f"{quantization} weights are saved as {dtype} numbers: load the folder with "
                f"quantization={quantization!r} to have the same",
                stacklevel=2,
            )
        config = replace(self.config, torch_dtype=dtype).to_dict()
        files = {"config.json": to_json(config, indent=2)}
        if self.generation_config:
            files["generation_config.json"] = to_json(dict(self.generation_config), indent=2)
        if self.tokenizer is None:
            warnings.warn("the model has no tokenizer, so the folder has none", stacklevel=2)
        else:
            files |= self.tokenizer.files()
        write_checkpoint(
            folder, files, tensors, max_shard_bytes=most, overwrite=truth("overwrite", overwrite)
        )

    def save_prefix(
        self, path: str | PathLike[str], prompt: AnyPrompt, *, overwrite: bool = False
    ) -> int:
        """Writes what the KV cache holds of a prompt to a file, for `load_prefix`.

        What is not in the cache is computed first. The file serves every mesh. It holds whole KV
        blocks (32 tokens each): the rest of a prompt is computed with each answer.

        Args:
            path: the file, in a folder that is there.
            prompt: text, token ids or a conversation, as `generate` takes it; of a conversation
                without what begins an answer, so that longer ones begin with it.
            overwrite: replace a file that is there.

        Returns:
            How many tokens were saved.

        Raises:
            MeshwenError: see `Engine.save_prefix`.
        """
        tokens = self._prompts.token_ids(prompt, {"add_generation_prompt": False})
        return self.engine.save_prefix(path, tokens, overwrite=truth("overwrite", overwrite))

    def load_prefix(self, path: str | PathLike[str]) -> int:
        """Puts a saved prefix into the KV cache: prompts that begin with it are not computed anew.

        In exact numerics their answers have the bits that they have without it. Load files of your
        own or of people whom you trust: a file says itself which text its keys and values are of.

        Args:
            path: what `save_prefix` wrote, on whatever mesh.

        Returns:
            How many tokens are in the cache now.

        Raises:
            MeshwenError: see `Engine.load_prefix`.
        """
        return self.engine.load_prefix(path)

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
            attention_mask: int or bool [batch, sequence], 1 at tokens and 0 at padding, on either
                side of a sequence; logits at padding mean nothing. None: no padding.

        Returns:
            float32 [batch, sequence, vocab_size].

        Raises:
            MeshwenError: the ids are not a batch, one is outside the vocabulary, or the mask is
                anything else: floats to be added, other numbers, padding between tokens.
        """
        batch = TokenBatch.of(input_ids, attention_mask, self.config)
        with self.engine.exclusive():
            logits = self.runner.logits(batch.padded(self.plan.data_devices))
            logits = batch.restored(logits[..., : self.config.vocab_size])
            return logits if logits.is_fully_addressable else jnp.asarray(to_host(logits))

    @documented(SamplingParams, "Sampling parameters, with their values where nobody gives others")
    def generate(self, prompts: Any, **sampling: Any) -> list[Completion]:
        """Continues prompts.

        Args:
            prompts: one prompt or several, each text (taken as it is), token ids (a list or an
                array), or a conversation, a list of `{"role": ..., "content": ...}`, which goes
                through the chat template.
            sampling: fields of `SamplingParams`, listed below; what is not given is the
                checkpoint's default.
                Also `chat_template_kwargs`, further variables for the chat template of
                conversations, such as `{"enable_thinking": False}`.
                Without a `seed`, whatever is drawn is drawn anew for each prompt and call; the
                completion has the seed. (Over several processes, which must draw alike, it is 0.)

        Returns:
            One completion a prompt, in order; with `n`, as many of each, one behind the other.

        Raises:
            MeshwenError: a prompt is empty or too long, a value is impossible, or the model's
                logits are NaN or infinite (`engine.run` still gives the other answers).
        """
        several = several_prompts(prompts)
        # An iterator has its items once, and every prompt needs them.
        sampling = {k: list(v) if isinstance(v, Iterator) else v for k, v in sampling.items()}
        with self.engine.run([self.request(prompt, **sampling) for prompt in several]) as events:
            found = {
                (event.request, event.choice): event.completion
                for event in events
                if event.completion is not None
            }
        for (number, _), completion in sorted(found.items()):
            if completion.error is not None:
                raise MeshwenError(f"prompt {number + 1}: {completion.error}")
        return [found[place] for place in sorted(found)]

    def stream(self, prompt: AnyPrompt, **sampling: Any) -> Stream[str]:
        """Continues one prompt, and yields the text as it comes, whole characters at a time.

        With `async for`, the event loop goes on while a step runs. Takes and raises what `generate`
        does.
        """
        request = self.request(prompt, **sampling)
        if request.sampling.n != 1:
            raise MeshwenError(f"n must be 1 for a stream of text, not {request.sampling.n}")
        events = self.engine.run([request])
        errors: list[str] = []
        return Stream(lambda: _next_text(events, errors), events.close)

    def events(self, prompt: AnyPrompt, **sampling: Any) -> Stream[Event]:
        """As `stream`, but yields every token with its text, and errors as completions."""
        return self.engine.run([self.request(prompt, **sampling)])

    def _eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the first source that names any, as in transformers."""
        given = self.generation_config.get("eos_token_id")
        if isinstance(given, int):
            return (given,)
        own = () if self.tokenizer is None else self.tokenizer.eos_token_ids
        return tuple(given or self.config.eos_token_id or own)

    def request(
        self,
        prompt: AnyPrompt,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Request:
        """A request to the engine, with the checkpoint's sampling defaults.

        What would change tokens and is not supported of them is warned of once.
        """
        return self._prompts.request(prompt, chat_template_kwargs or {}, sampling)


class Qwen2ForCausalLM(CausalLM):
    """A Qwen2 or Qwen2.5 model."""

    model_type = "qwen2"


class Qwen3ForCausalLM(CausalLM):
    """A dense Qwen3 model."""

    model_type = "qwen3"


_CLASSES: dict[str | None, type[CausalLM]] = {
    one.model_type: one for one in (Qwen2ForCausalLM, Qwen3ForCausalLM)
}


class AutoModelForCausalLM:
    """Loads a model of any architecture, as the class for it."""

    from_pretrained = staticmethod(CausalLM.from_pretrained)
    from_checkpoint = staticmethod(CausalLM.from_checkpoint)


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
