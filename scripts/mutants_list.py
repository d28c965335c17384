# SPDX-License-Identifier: Apache-2.0
"""Faults that the tests must find: see `mutants.py`. Each is one that a change could bring in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A piece of a file and what takes its place.

    Attributes:
        name: "part: what is wrong".
        path: of the file, from the repository's root.
        old: text that is there once.
        new: the text with the fault.
        tests: names of the test files that should find it, `model` for `tests/test_model.py`.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


_PACKAGE = "src/meshwen/"


def _fault(name: str, path: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, _PACKAGE + path, old, new, tests)


FAULTS = (
    # --- Numerics
    _fault(
        "exact: tree adds other neighbours",
        "ops/numerics/exact.py",
        "pairs = [sums[i] + sums[i + 1] for i in range(0, len(sums) - 1, 2)]",
        "pairs = [sums[i] + sums[-1 - i] for i in range(len(sums) // 2)]\n"
        "        if len(sums) % 2:\n"
        "            pairs.append(sums[len(sums) // 2])\n"
        "            sums = []",
        "exact",
    ),
    _fault(
        "exact: products are not rounded before they are added",
        "ops/numerics/exact.py",
        "return lax.optimization_barrier(products)",
        "return products",
        "exact",
    ),
    _fault(
        "exact: negative zeros stay",
        "ops/numerics/exact.py",
        "return jnp.where(x == 0, 0.0, x)",
        "return x",
        "exact",
    ),
    _fault(
        "exact: one row keeps its own order",
        "ops/numerics/exact.py",
        "_MIN_ROWS = 8 ",
        "_MIN_ROWS = 1 ",
        "exact",
    ),
    _fault(
        "exact: all-reduce of floats",
        "ops/numerics/exact.py",
        "        n = self.devices\n        padded",
        "        return _positive_zeros(lax.psum(x, self.axes))\n"
        "        n = self.devices\n        padded",
        "exact",
    ),
    _fault(
        "numerics: partial sums in bfloat16",
        "ops/contractions.py",
        "return self.all_reduce(self._product(x, weight, contract=0))",
        "y = self._product(x, weight, contract=0)\n"
        "        return self.all_reduce(y.astype(jnp.bfloat16).astype(jnp.float32))",
        "mesh_parity",
    ),
    _fault(
        "numerics: float32 products in lower precision",
        "ops/contractions.py",
        "precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT",
        "precision = lax.Precision.DEFAULT",
        "model",
    ),
    _fault(
        "numerics: keys in the dtype of values",
        "cache/kv_cache.py",
        "jnp.zeros((batch, heads, head_dim, slots), jnp.float32),",
        "jnp.zeros((batch, heads, head_dim, slots), dtype),",
        "model",
        "kv_cache",
    ),
    # --- The model
    _fault(
        "model: window of one token more",
        "models/qwen2.py",
        "(query - key < window)",
        "(query - key <= window)",
        "model",
    ),
    _fault(
        "model: YaRN without its attention factor",
        "models/qwen2.py",
        "(cos * attention_factor, sin * attention_factor)",
        "(cos, sin)",
        "model",
    ),
    _fault(
        "model: RMSNorm without eps",
        "models/qwen2.py",
        "tp.mean_square(x) + eps)",
        "tp.mean_square(x))",
        "model",
    ),
    _fault(
        "model: last chunk's wanted token off by one",
        "engine/runner.py",
        "last = lengths - 1 - start",
        "last = lengths - 2 - start",
        "engine",
    ),
    _fault(
        "rope: YaRN blends whole pairs upwards",
        "ops/rotary.py",
        "low, high = math.floor(low), math.ceil(high)",
        "low, high = math.ceil(low), math.ceil(high)",
        "rotary",
    ),
    # --- Sharding
    _fault(
        "sharding: a slot more than a group has",
        "parallel/heads.py",
        "head[(within >= group) |",
        "head[(within > group) |",
        "heads",
    ),
    _fault(
        "sharding: padding repeats the last row",
        "parallel/plan.py",
        "source[size:] = PADDING",
        "source[size:] = size - 1",
        "loading",
        "plan",
    ),
    _fault(
        "sharding: lookup beyond a device's rows",
        "ops/contractions.py",
        "here = (row >= 0) & (row < count)",
        "here = (row >= 0) & (row <= count)",
        "mesh_parity",
    ),
    _fault(
        "sharding: the sampler gathers all logits",
        "engine/sampling.py",
        "    values, local = _largest(logits, count)\n    choices = ids[local]\n    if tp.axes:",
        "    if tp.axes:\n"
        "        logits = lax.all_gather(logits, tp.axes, axis=1, tiled=True)\n"
        "        ids = lax.all_gather(ids, tp.axes, axis=0, tiled=True)\n"
        "    values, local = _largest(logits, count)\n    choices = ids[local]\n    if False:",
        "engine",
        "mesh_parity",
    ),
    _fault(
        "sharding: devices in another order",
        "parallel/mesh.py",
        "Mesh(np.asarray(devices).reshape(shape), names)",
        "Mesh(np.asarray(devices[::-1]).reshape(shape), names)",
        "mesh",
    ),
    _fault(
        "mesh: what splits the model splits the batch",
        "parallel/mesh.py",
        "own = [MODEL_AXIS if name in kinds[MODEL_AXIS] else DATA_AXIS for name in kept]",
        "own = [MODEL_AXIS if name in kinds[DATA_AXIS] else DATA_AXIS for name in kept]",
        "mesh",
    ),
    _fault(
        "processes: the same id twice passes",
        "parallel/rendezvous.py",
        "if before is not None and not _has_left(before[0]):",
        "if False:",
        "rendezvous",
    ),
    _fault(
        "processes: another number of them passes",
        "parallel/rendezvous.py",
        "    if theirs != processes:",
        "    if False:",
        "rendezvous",
    ),
    _fault(
        "processes: of a large tensor only the beginning is compared",
        "checkpoints/digest.py",
        "np.linspace(0, rows - of_each, _SAMPLES)",
        "np.linspace(0, 0, _SAMPLES)",
        "agreement",
    ),
    _fault(
        "processes: seeds may differ",
        "engine/agreement.py",
        'digest([mine.get("sampling parameters"), sampling])',
        '""',
        "agreement",
    ),
    _fault(
        "JAX's settings: the caller's 64-bit types are kept",
        "runtime/jax_settings.py",
        '    (jax.enable_x64, False, ("jax_enable_x64",)),\n',
        "",
        "jax_settings",
    ),
    _fault(
        "JAX's settings: the caller's mesh stays set",
        "runtime/jax_settings.py",
        "if not jax.sharding.get_abstract_mesh().empty:",
        "if False:",
        "jax_settings",
    ),
    _fault(
        "JAX's settings: the caller's offset of seeds counts",
        "engine/sampling.py",
        'jax.random.wrap_key_data(words, impl="threefry2x32")',
        'jax.random.key(seed, impl="threefry2x32")',
        "jax_settings",
    ),
    # --- Kernels
    _fault(
        "kernels: a window of one slot more",
        "ops/cpu/kernels/attention.ll",
        "  %first.any = sub i64 %behind, %window\n",
        "  %first.any = sub i64 %slot, %window\n",
        "kernels",
    ),
    _fault(
        "kernels: earlier passes are not rescaled",
        "ops/cpu/kernels/attention.ll",
        "br i1 %is.first, label %row.end, label %row.scale",
        "br label %row.end",
        "kernels",
    ),
    _fault(
        "kernels: a part of a panel has a column less",
        "ops/cpu/kernels/product.ll",
        "  %bytes = mul i64 %columns, 4\n  br label %row",
        "  %columns.less = sub i64 %columns, 1\n"
        "  %bytes = mul i64 %columns.less, 4\n"
        "  br label %row",
        "kernels",
    ),
    _fault(
        "kernels: runs of sums by the number of rows",
        "ops/cpu/kernels/product.ll",
        "%chunk.steps = call i64 @llvm.umin.i64(i64 %run, i64 %steps.left)",
        "%run.some = lshr i64 %run, 1\n"
        "  %run.chosen = select i1 %unpacks, i64 %run.some, i64 %run\n"
        "  %chunk.steps = call i64 @llvm.umin.i64(i64 %run.chosen, i64 %steps.left)",
        "kernels",
    ),
    _fault(
        "kernels: int8 corrections with the other sign",
        "ops/cpu/kernels/int8.ll",
        "mul i32 %sum, -128",
        "mul i32 %sum, 128",
        "quantization",
    ),
    _fault(
        "kernels: padded rows are all the first",
        "ops/cpu/kernels/__init__.py",
        "rows = jnp.arange(len(q), dtype=jnp.int32)",
        "rows = jnp.zeros(len(q), dtype=jnp.int32)",
        "kernels",
    ),
    _fault(
        "quantization: scales rounded to nearest",
        "ops/quant/int8.py",
        "jnp.minimum(bits, 0x7FC00000) + 0xFFFF",
        "jnp.minimum(bits, 0x7FC00000) + 0x7FFF",
        "quantization",
    ),
    # --- Engine and sampling
    _fault(
        "engine: decode writes into a row that is being prefilled",
        "engine/scheduler.py",
        "            positions[:] = self._reading.start",
        "            pass",
        "engine_batching",
        "engine",
    ),
    _fault(
        "engine: prefill starves decode",
        "engine/scheduler.py",
        "or self._reads >= _MOST_READS)",
        "or not self._reads)",
        "engine_batching",
    ),
    _fault(
        "engine: the sampler forgets a new request",
        "engine/scheduler.py",
        "            self._reading = self._sampler = None\n            sampled",
        "            self._reading = None\n            sampled",
        "engine_batching",
        "engine",
    ),
    _fault(
        "engine: rejected drafts are accepted",
        "engine/scheduler.py",
        "for i in range(1 + right):",
        "for i in range(1 + len(guessed)):",
        "prompt_lookup",
    ),
    _fault(
        "engine: prefill goes on after a cancellation",
        "engine/scheduler.py",
        "            self._reading = self._reading.without(ended)",
        "            pass",
        "engine_batching",
    ),
    _fault(
        "engine: the cache is as long as a ceiling",
        "engine/scheduler.py",
        "answer = min(sequence.limit - len(sequence.tokens), _AHEAD)",
        "answer = sequence.limit - len(sequence.tokens)",
        "engine_batching",
    ),
    _fault(
        "engine: an answer is read again without its tokens",
        "engine/prefill.py",
        "known = sequence.token_ids",
        "known = sequence.request.prompt_tokens",
        "engine_batching",
    ),
    _fault(
        "engine: an answer without room goes on",
        "engine/scheduler.py",
        "if s.position >= self._length]",
        "if s.position > self._length]",
        "engine_batching",
    ),
    _fault(
        "engine: an interrupt ends the requests of others",
        "engine/engine.py",
        "if not isinstance(error, Exception):",
        "if False:",
        "engine_threads",
    ),
    _fault(
        "engine: a step that broke off is not told to others",
        "engine/engine.py",
        "                    live.run.failure = failure",
        "                    pass",
        "engine_threads",
    ),
    _fault(
        "engine: who closes a stream wakes nobody",
        "engine/engine.py",
        "            self._numbers.clear()\n            self._engine._turns.changed.notify_all()",
        "            self._numbers.clear()",
        "engine_threads",
    ),
    _fault(
        "engine: the last to come has the first turn",
        "engine/turns.py",
        "self._line[0] is ticket",
        "self._line[-1] is ticket",
        "engine_threads",
    ),
    _fault(
        "engine: logits are computed beside a step",
        "causal_lm.py",
        "        with self.engine.exclusive():",
        "        if True:",
        "engine_threads",
    ),
    _fault(
        "engine: a grown cache mixes up the parts",
        "cache/kv_cache.py",
        "split = array.reshape(parts, old[0] // parts, *old[1:])",
        "split = array.reshape(old[0] // parts, parts, *old[1:]).swapaxes(0, 1)",
        "kv_cache",
        "engine_batching",
    ),
    _fault(
        "engine: half of a stop string is shown",
        "engine/sequence.py",
        "max((len(s) - 1 for s in self._stop), default=0)",
        "max((len(s) - 2 for s in self._stop), default=0)",
        "engine",
    ),
    _fault(
        "engine: stop strings do not see special tokens",
        "engine/sequence.py",
        "self._decoder.push(token), self._tokenizer.special_text(token)",
        "self._decoder.push(token)",
        "engine",
    ),
    _fault(
        "evals: the harness's styles do not stop at the tokenizer's eos",
        "evals/gsm8k.py",
        "style.stop_strings(eos_token)",
        "style.stop",
        "evals_styles",
    ),
    _fault(
        "engine: only the first end-of-text token counts",
        "causal_lm.py",
        "return tuple(given or config.eos_token_id",
        "return tuple((given or ())[:1] or config.eos_token_id",
        "causal_lm",
    ),
    _fault(
        "sampling: top-p leaves out the token that reaches it",
        "engine/sampling.py",
        "before = (lax.associative_scan(jnp.add, weights, axis=1) - weights) / total",
        "before = lax.associative_scan(jnp.add, weights, axis=1) / total",
        "sampling",
    ),
    _fault(
        "sampling: a penalty lifts negative logits",
        "engine/sampling.py",
        "penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)",
        "penalized = logits / penalty",
        "sampling",
    ),
    _fault(
        "constraints: a run that comes again is let through",
        "engine/constraints.py",
        "self._ends.setdefault(tuple(self._last), []).append(token)",
        "self._ends[tuple(self._last)] = [token]",
        "constraints",
    ),
    _fault(
        "constraints: an end-of-text token comes too early",
        "engine/constraints.py",
        "length < asked.min_length or answered < asked.min_new_tokens",
        "length < asked.min_length",
        "constraints",
    ),
    _fault(
        "constraints: drafts where tokens are forbidden",
        "engine/scheduler.py",
        "sampler.method.penalize or sampler.constrained",
        "sampler.method.penalize",
        "constraints",
    ),
    _fault(
        "generation config: min_length beside min_new_tokens",
        "engine/generation_config.py",
        "elif new in values:",
        "elif new in given:",
        "generation_config",
    ),
    _fault(
        "generation config: unknown keys are passed over",
        "engine/generation_config.py",
        "key not in _NEUTRAL or value",
        "key in _NEUTRAL and value",
        "generation_config",
    ),
    _fault(
        "sampling: temperatures overflow",
        "engine/sampling.py",
        "return min(max(number, _LEAST_FACTOR), _MOST_FACTOR)",
        "return number",
        "sampling",
    ),
    _fault(
        "sampling: NaN is no error",
        "engine/sampling.py",
        "logits = jnp.where(finite, logits, jnp.inf)",
        "logits = jnp.where(finite, logits, -1)",
        "sampling",
    ),
    _fault(
        "sampling: noise brings forbidden tokens back",
        "engine/sampling.py",
        "jnp.maximum(scaled + noise, lowest)",
        "scaled + noise",
        "sampling",
    ),
    _fault(
        "engine: what a callback raised is lost with an interrupted step",
        "engine/engine.py",
        "            self._take_errors()  # Before they are lost with the step.\n",
        "",
        "engine_threads",
    ),
    _fault(
        "engine: NaN in a row reaches the row's next request",
        "engine/scheduler.py",
        'one.finish_reason not in ("stop", "length")',
        'one.finish_reason == "never"',
        "engine",
    ),
    _fault(
        "evals: an answer that failed is graded",
        "evals/gsm8k.py",
        "_failed(one, error) if error else",
        "_failed(one, error) if not one else",
        "evals_styles",
    ),
    _fault(
        "sampling: noise by the row's place",
        "engine/sampling.py",
        "uniform = jax.vmap(row)(seed, positions, ids)",
        "uniform = jax.vmap(row)(seed, positions + jnp.arange(len(seed)), ids)",
        "sampling",
    ),
    _fault(
        "sampling: log-probabilities after the penalty",
        "engine/sampling.py",
        "_logprobs(raw, ids, tokens, tp)",
        "_logprobs(logits, ids, tokens, tp)",
        "sampling",
    ),
    # --- Loaders
    _fault(
        "loading: float32 is cut off, not rounded",
        "ops/cpu/packing.py",
        "return _panels(weight.astype(dtype)), None",
        "import jax.numpy as np_\n\n"
        "        if dtype == np_.bfloat16 and weight.dtype == np_.float32:\n"
        "            cut = jax.lax.bitcast_convert_type(weight, np_.uint32) >> 16\n"
        "            weight = jax.lax.bitcast_convert_type(cut.astype(np_.uint16), np_.bfloat16)\n"
        "        return _panels(weight.astype(dtype)), None",
        "loading",
    ),
    _fault(
        "loading: a differing tied head is taken",
        "weights/loading.py",
        "    if not same:\n",
        "    if False:\n",
        "loading",
    ),
    _fault(
        "loading: unexpected tensors are passed over",
        "weights/loading.py",
        "if name not in expected and not tied_copy and",
        "if False and name not in expected and not tied_copy and",
        "loading",
    ),
    _fault(
        "loading: NaN weights are taken",
        "weights/finite.py",
        "    if _all_below(values, _first_infinite(dtype)):",
        "    if True:",
        "loading",
    ),
    _fault(
        "checkpoints: more layers than tensors are laid out",
        "checkpoints/dimensions.py",
        "    if config.num_hidden_layers > len(tensors):",
        "    if False:",
        "checkpoints_open",
    ),
    _fault(
        "gguf: a tensor begins anywhere",
        "checkpoints/gguf.py",
        "        if info.offset != expected:",
        "        if False:",
        "checkpoints_gguf",
    ),
    _fault(
        "torch: a compressed archive is mapped as it lies",
        "checkpoints/torch_zip.py",
        "if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:",
        "if False:",
        "checkpoints_torch_zip",
    ),
    _fault(
        "safetensors: a tensor in two shards",
        "checkpoints/base.py",
        "            if name in tensors:",
        "            if False:",
        "checkpoints_safetensors",
    ),
    _fault(
        "gguf: blocks of a slice from the first column",
        "checkpoints/gguf.py",
        "columns = np.arange(wanted.start, wanted.stop, wanted.step) - first * self.block_elements",
        "columns = np.arange(wanted.start, wanted.stop, wanted.step) % covered",
        "checkpoints_gguf",
    ),
    _fault(
        "gguf: truncation is not noticed",
        "checkpoints/gguf.py",
        'if place["offset"] + place["nbytes"] > len(file):',
        "if False:",
        "checkpoints_gguf",
    ),
    _fault(
        "config: unknown RoPE scaling is taken for none",
        "models/rope_scaling.py",
        "    if rope_type not in ROPE_TYPES:\n        raise MeshwenError(",
        "    if rope_type not in ROPE_TYPES:\n"
        "        return float(theta), None\n"
        "        raise MeshwenError(",
        "config",
    ),
    _fault(
        "tokenizer: split bytes vanish",
        "tokenizer/tokenizer.py",
        'getincrementaldecoder("utf-8")(errors="replace")',
        'getincrementaldecoder("utf-8")(errors="ignore")',
        "tokenizer",
    ),
    _fault(
        "tokenizer: a chat gets a second beginning",
        "tokenizer/tokenizer.py",
        "return self.encode(text, add_special_tokens=False)",
        "return self.encode(text)",
        "tokenizer",
    ),
    _fault(
        "tokenizer: a stranger's pattern runs here",
        "tokenizer/backend.py",
        'pattern.get("Regex") in _SPLITS or',
        '"Regex" in pattern or',
        "tokenizer_backend",
    ),
    _fault(
        "tokenizer: added_tokens.json takes flags away",
        "tokenizer/files.py",
        "{**here, **token} if here else token",
        "token",
        "tokenizer",
    ),
    _fault(
        "tokenizer: the config's flags are not heeded",
        "tokenizer/files.py",
        "self._tokens[index] = {**here, **token} if here else token",
        "self._tokens.setdefault(index, token)",
        "tokenizer",
    ),
    _fault(
        "chat template: the continued message is ended",
        "tokenizer/chat_template.py",
        "return text[:at] if text[at:].startswith(_END_TAG) else text[:at].rstrip()",
        'return text.replace(tag, "")',
        "tokenizer",
        "chat_template",
    ),
    _fault(
        "chat template: no sandbox",
        "tokenizer/chat_template_worker.py",
        "environment = ImmutableSandboxedEnvironment(",
        "environment = jinja2.Environment(",
        "chat_template",
    ),
    # --- Command line
    _fault(
        "cli: what a user must change is a defect",
        "cli/app.py",
        "USER_MUST_CHANGE, DEFECT = 2, 3",
        "USER_MUST_CHANGE, DEFECT = 3, 3",
        "cli_errors",
    ),
    _fault(
        "cli: answers come as they end",
        "cli/generate.py",
        "        while following in waiting:\n"
        "            yield following, waiting.pop(following)\n"
        "            following += 1",
        "        while waiting:\n            yield waiting.popitem()",
        "cli_generate",
    ),
    _fault(
        "cli: processes may have other options",
        "cli/processes.py",
        '    check_same("the processes\' options", mine, "start all with the same options")\n',
        "",
        "distributed",
    ),
    _fault(
        "inspect: bytes of a device without padding",
        "weights/sizes.py",
        "shape = weight.shard_shape(plan)[:: -1 if weight.transposed else 1]",
        "shape = tuple(n // plan.model_devices for n in weight.shape(plan)[:1])"
        " + weight.shape(plan)[1:]",
        "cli_inspect",
    ),
    # --- Verification, evaluation, reports
    _fault(
        "verify: asynchronous collectives are not seen",
        "verify/hlo.py",
        "reduce-scatter)(?P<start>-start)?",
        "reduce-scatter)(?P<start>-begun)?",
        "hlo",
    ),
    _fault(
        "verify: a checksum that signs leave alone",
        "verify/localise.py",
        "_mixed(bits ^ _mixed(place))",
        "(bits * (2 * place + 1))",
        "verify_localise",
    ),
    _fault(
        "verify: NaN keeps a promise",
        "verify/promises.py",
        "if not math.isfinite(difference.max_abs):",
        "if difference.max_abs == math.inf:",
        "verify_metrics",
        "verify",
    ),
    _fault(
        "certificate: other weights are not told",
        "verify/certificate.py",
        'if before["weights_sha256"] != after["weights_sha256"]:',
        "if False:",
        "verify",
    ),
    _fault(
        "certificate: one without tokens confirms them",
        "verify/certificate.py",
        'before["generated"].get(numerics) != tokens',
        'before["generated"].get(numerics, tokens) != tokens',
        "verify",
    ),
    _fault(
        "certificate: an edit is not told",
        "verify/certificate_file.py",
        "if content[_HASH] != _content_sha256(content):",
        "if not content[_HASH]:",
        "verify_files",
    ),
    _fault(
        "json: a file's shape is not held against anything",
        "common/json_files.py",
        "_validator(cast(Any, shape)).validate_python(value, strict=True)",
        "pass",
        "fuzz",
    ),
    _fault(
        "json: NaN is written",
        "common/json_files.py",
        "return write(_finite(value))",
        "return json.dumps(value)",
        "json_files",
    ),
    _fault(
        "json: nesting is not bounded",
        "common/json_files.py",
        "too_deep = _deeper_than(value, DEPTH_LIMIT)",
        "too_deep = False",
        "json_files",
    ),
    _fault(
        "eval: a torn line is read on",
        "evals/run_file.py",
        "file.truncate(sum(len(line) + 1 for line in lines))",
        "pass",
        "evals_run_file",
    ),
    _fault(
        "eval: a box ends at the first brace",
        "evals/answers.py",
        'depth += {"{": 1, "}": -1}.get(text[at], 0)',
        'depth += {"}": -1}.get(text[at], 0)',
        "evals_answers",
    ),
    _fault(
        "eval: a letter of any script keeps a number from beginning",
        "evals/numerals.py",
        r'_BEGINS = rf"(?<![0-9{_LETTER}])',
        r'_BEGINS = rf"(?<!\w)',
        "evals_answers",
        "evals_styles",
    ),
    _fault(
        "eval: a decimal comma marks thousands",
        "evals/numerals.py",
        'return Fraction(digits.replace(".", "").replace(",", "."))',
        'return Fraction(digits.replace(",", ""))',
        "evals_answers",
    ),
    _fault(
        "eval: runs with other problems can be identical",
        "cli/eval.py",
        "    if any(found.alone):\n        return False\n",
        "",
        "cli_eval",
    ),
    _fault(
        "eval: a base model is one without a chat template alone",
        "evals/default_style.py",
        "if end is None or end in _ends(checkpoint, tokenizer):",
        "if True:",
        "evals_styles",
    ),
    _fault(
        "reports: any script may run",
        "pages/base.html.jinja",
        "script-src {{ script_source }};",
        "script-src 'unsafe-inline';",
        "pages",
    ),
    _fault(
        "eval: flips are told the wrong way round",
        "evals/compare.py",
        "only_first = tuple(key for key, flip in flips.items() if flip > 0)",
        "only_first = tuple(key for key, flip in flips.items() if flip < 0)",
        "cli_eval",
        "evals_run_file",
        "evals_statistics",
    ),
    _fault(
        "eval: samples of a problem share a seed",
        "evals/gsm8k.py",
        "entropy = [base, self.problem.number, self.sample]",
        "entropy = [base, self.problem.number]",
        "cli_eval",
    ),
    _fault(
        "eval: control characters reach the terminal",
        "cli/console.py",
        r'_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")',
        r'_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")',
        "cli_eval",
        "cli_streams",
    ),
    _fault(
        "cli: a model's escape sequences reach the terminal",
        "cli/console.py",
        "print(harmless(text) if sys.stdout.isatty() else text, end=end, flush=True)",
        "print(text, end=end, flush=True)",
        "cli_streams",
    ),
    _fault(
        "cli: notes go to stdout where stderr is closed",
        "cli/streams.py",
        "    if sys.stderr is None:\n",
        "    if False:\n",
        "cli_streams",
    ),
    _fault(
        "chat: Ctrl-C waits until the whole prompt is read",
        "cli/interrupt.py",
        "        pressed.set()\n        stop()\n",
        "        pressed.set()\n",
        "cli_chat",
    ),
    _fault(
        "chat: an answer is drawn again with the same seed",
        "cli/chat.py",
        "conversation.sampling = with_fresh_seed(conversation.sampling)",
        "conversation.sampling = with_fresh_seed(conversation.sampling) and conversation.sampling",
        "cli_chat",
    ),
    _fault(
        "prompts: tools do not reach the template",
        "cli/prompts.py",
        "variables = {**(template_kwargs or {}), **self.template_fields}",
        "variables = {**(template_kwargs or {})}",
        "cli_prompts",
    ),
    _fault(
        "arguments: a generator of prompts is used up before it is read",
        "common/arguments.py",
        '    items = _items("prompts", value)\n    alone = [',
        '    _items("prompts", value)\n    items = _items("prompts", value)\n    alone = [',
        "arguments",
    ),
    _fault(
        "arguments: true is a whole number",
        "common/arguments.py",
        "        return not isinstance(value, bool)\n",
        "        return True\n",
        "arguments",
    ),
    _fault(
        "tables: the least width of numbers is that of their first words",
        "cli/tables.py",
        "whole = 0 if self._prose[column] else _widest(texts)",
        "whole = 0",
        "cli_tables",
    ),
    _fault(
        "tables: texts of users are markup",
        "cli/console.py",
        "return Text(harmless(text).expandtabs(), style=style)",
        "return Text.from_markup(harmless(text).expandtabs(), style=style)",
        "cli_tables",
    ),
    _fault(
        "bench: the table that is looked up counts as read",
        "bench/costs.py",
        "if w.name not in {EMBEDDING.name, LM_HEAD.name}]",
        "if w.name != LM_HEAD.name]",
        "bench",
    ),
    _fault(
        "report: names are not escaped",
        "pages/__init__.py",
        "autoescape=True",
        "autoescape=False",
        "verify",
        "bench",
    ),
    # --- Processes, and how they end
    _fault(
        "processes: JAX's preemption service takes SIGTERM",
        "parallel/distributed.py",
        'jax.config.update("jax_enable_preemption_service", False)',
        'jax.config.update("jax_enable_preemption_service", True)',
        "distributed",
    ),
    _fault(
        "interrupt: a signal within a callback is lost",
        "cli/interrupt.py",
        "        again.start()\n",
        "",
        "cli_interrupt",
    ),
    _fault(
        "interrupt: what a prompt took still ends the program",
        "cli/interrupt.py",
        "            del error  # This frame, which the exception refers to, would keep it alive.",
        "            pass",
        "cli_interrupt",
    ),
    _fault(
        "compilation cache: a program that was cut off stays",
        "runtime/compilation_cache.py",
        "return bool(expander.eof)",
        "return True",
        "compilation_cache",
    ),
    _fault(
        "compilation cache: the folder of another user is used",
        "runtime/compilation_cache.py",
        "if found.st_uid != os.getuid():",
        "if False:",
        "compilation_cache",
    ),
    _fault(
        "programs: none is ever dropped",
        "runtime/programs.py",
        "if len(self._programs) > self._limit:",
        "if False:",
        "programs",
    ),
    _fault(
        "programs: those of all shapes live in one function",
        "runtime/programs.py",
        "key = (self._make, *map(_shape, arguments), *static.values())",
        "key = (self._make, *static.values())",
        "programs",
    ),
)
