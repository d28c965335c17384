# SPDX-License-Identifier: Apache-2.0
"""Trains the embedded demo checkpoint: a 1/16-scale Qwen2.5-7B that solves small word problems.

    python scripts/train_demo.py --out src/meshwen/demo --seed 0

writes the folder but for its data card: held-out problems, tokenizer, config, bfloat16 weights.
It needs the package with its extra `train` (optax), about 1 GiB of memory, and on two CPU cores
about 25 minutes. Tokenizer, data order and initial weights follow from `--seed` alone; the
trained weights also depend on how XLA orders float32 sums on the machine.

`--state FILE` saves the training state now and then and goes on from it; `--evaluate` only scores
what is in `--out` on its held-out problems.

The forward pass is the one that serves, `meshwen.models.qwen2`; the gradient goes through it as
it is.
"""

import argparse
import json
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from safetensors.numpy import save_file

from demo_problems import LARGEST, Problem, ProblemSet
from demo_tokenizer import (
    ENDOFTEXT,
    IM_END,
    SYSTEM_PROMPT,
    SYSTEM_TURN,
    check_turns,
    turn,
    write_json,
    write_tokenizer,
)
from meshwen.causal_lm import Qwen2ForCausalLM
from meshwen.models.parallel_model import ParallelModel
from meshwen.models.qwen2 import Qwen2Config, hidden_states, logits
from meshwen.models.rope_frequencies import inverse_frequencies
from meshwen.ops.operations import Ops
from meshwen.ops.weight import Weight
from meshwen.parallel.mesh import make_mesh
from meshwen.tokenizer.tokenizer import Tokenizer
from meshwen.weights.declaration import unflatten
from meshwen.weights.layout import WeightLayout

VOCABULARY = 1024
LAYERS = 4
TOKENIZER_PROBLEMS = 20_000
BATCH = 24
STEPS = 2000
WARMUP, DECAY = 30, 0.95  # steps; share of all steps
PEAK_LEARNING_RATE = 0.005
SINGLE_SUMS, SUMS_ONLY, MOST_SUMS = 50, 100, 4  # steps; steps; plain sums a problem
PLAIN_SUMS, SMALL_TALK = 0.2, 0.01  # final shares of the training problems
LENGTH_STEP = 8  # rows are padded to a multiple of this many tokens
BATCHES_A_ROUND = 4  # problems of so many batches are sorted by length together
MAX_ANSWER = 80  # tokens
SCORED_AT_ONCE = 50  # held-out problems


def demo_config(eos_token_id: int, bos_token_id: int) -> Qwen2Config:
    """Qwen2.5-7B with every width divided by 16, and the same numbers of heads."""
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=3584 // 16,
        intermediate_size=18944 // 16,
        num_hidden_layers=LAYERS,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        rope_theta=1e3,  # four frequencies: wavelengths of 6 to 1117 tokens
        bos_token_id=bos_token_id,
        eos_token_id=(eos_token_id,),
        torch_dtype="bfloat16",
        name="demo",
    )


# Data: a row is a conversation of one or two problems; the loss is on the answers.


@dataclass(frozen=True)
class Mixture:
    """What the training stream is made of at a step."""

    plain_sums: float  # share of problems
    most_sums: int  # in one problem
    pairs: bool  # whether one batch of a round has two problems a row

    @classmethod
    def at(cls, step: int) -> "Mixture":
        """Single sums, then several, then ever more word problems.

        Copying numbers is learned within 50 steps from single sums, and much later from word
        problems.
        """
        plain_sums = float(np.clip(2 - step / SUMS_ONLY, PLAIN_SUMS, 1))
        return cls(plain_sums, 1 if step < SINGLE_SUMS else MOST_SUMS, plain_sums < 1)

    def draw(self, problems: ProblemSet, rng: np.random.Generator) -> Problem:
        """One problem of the training stream."""
        if rng.random() < SMALL_TALK:
            return problems.small_talk(rng)
        if rng.random() < self.plain_sums:
            return problems.plain_sums(rng, self.most_sums)
        return problems.draw(rng)


def tokenizer_texts(problems: ProblemSet, seed: int) -> Iterator[str]:
    rng, mixture = np.random.default_rng([seed, 1]), Mixture.at(STEPS)
    # Often enough that every number becomes one token.
    yield from [" ".join(map(str, range(LARGEST + 1)))] * TOKENIZER_PROBLEMS
    for _ in range(TOKENIZER_PROBLEMS):
        problem = mixture.draw(problems, rng)
        yield from (problem.question, problem.answer, "system\nuser\nassistant\n", SYSTEM_PROMPT)


class Row(NamedTuple):
    tokens: list[int]
    is_answer: list[bool]


def make_row(conversation: Sequence[Problem], tokenizer: Tokenizer) -> Row:
    """A conversation's tokens, and which of them the model is to learn to say."""
    tokens = tokenizer.encode(SYSTEM_TURN)
    is_answer: list[bool] = []
    for problem in conversation:
        tokens += tokenizer.encode(turn(problem.question))
        answer = tokenizer.encode(problem.answer + IM_END)
        is_answer += [False] * (len(tokens) - len(is_answer)) + [True] * len(answer)
        tokens += answer + tokenizer.encode("\n")
    return Row(tokens[:-1], is_answer)


class Batch(NamedTuple):
    tokens: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]: the next tokens
    weights: np.ndarray  # float32 [B, T]: 1 where the target is the answer's


def make_batch(rows: Sequence[Row]) -> Batch:
    """Right-padded rows, their length a multiple of `LENGTH_STEP`."""
    length = -(-max(len(row.tokens) - 1 for row in rows) // LENGTH_STEP) * LENGTH_STEP
    tokens = np.zeros((len(rows), length + 1), np.int32)
    weights = np.zeros((len(rows), length + 1), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        weights[i, : len(row.tokens)] = row.is_answer
    return Batch(tokens[:, :-1], tokens[:, 1:], weights[:, 1:])


def batches(problems: ProblemSet, tokenizer: Tokenizer, seed: int, step: int) -> Iterator[Batch]:
    """The training stream from a step on; each round of batches has its own random generator.

    A batch of pairs has half as many rows.
    """
    for number in range(step // BATCHES_A_ROUND, 1 << 30):
        rng = np.random.default_rng([seed, 2, number])
        mixture = Mixture.at(number * BATCHES_A_ROUND)
        drawn = [mixture.draw(problems, rng) for _ in range(BATCH * BATCHES_A_ROUND)]
        paired = BATCH if mixture.pairs else 0
        pairs = [make_row(drawn[i : i + 2], tokenizer) for i in range(0, paired, 2)]
        singles = [make_row([problem], tokenizer) for problem in drawn[paired:]]
        singles.sort(key=lambda row: len(row.tokens))
        groups = [singles[i : i + BATCH] for i in range(0, len(singles), BATCH)]
        groups += [pairs] if pairs else []
        for i in rng.permutation(BATCHES_A_ROUND):
            yield make_batch(groups[i])


# Model and optimiser. The weights are a flat dict by Hugging Face name.


def initial_weights(
    weights: Sequence[WeightLayout], config: Qwen2Config, seed: int
) -> dict[str, Array]:
    """Normal, with standard deviation 1/sqrt(inputs); less for what adds to the residual stream."""
    keys = jax.random.split(jax.random.key(seed), len(weights))
    values = {}
    for key, weight in zip(keys, weights, strict=True):
        shape, name = weight.shape, weight.path
        scale = shape[0] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= (2 * LAYERS) ** -0.5
        if name.startswith("lm_head"):
            scale = 0.02
        if name.startswith("model.embed_tokens"):
            scale = 0.5
        if len(shape) == 2:
            values[name] = jax.random.normal(key, shape) * scale
        else:
            values[name] = jnp.full(shape, 0.0 if name.endswith("bias") else 1.0)
    query, key_bias = look_back(config)
    values["model.layers.0.self_attn.q_proj.bias"] = jnp.asarray(query)
    values["model.layers.0.self_attn.k_proj.bias"] = jnp.asarray(key_bias)
    return values


def look_back(config: Qwen2Config) -> tuple[np.ndarray, np.ndarray]:
    """Query and key biases with which half of the first layer's heads look 0 to 7 tokens back.

    Biases that start at zero find this too late: neither has a gradient while the other is zero.
    Between a query rotated by p - d and a key rotated by s the product peaks at s = p - d.
    """
    frequencies, _ = inverse_frequencies(config)
    size = np.array([5.0, 4.0, 3.0, 1.0])  # sharpest for the fastest rotation
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    query = np.zeros((groups, heads // groups, 2, len(size)), np.float32)
    key = np.zeros((groups, 2, len(size)), np.float32)
    for group in range(groups // 2):
        key[group, 0] = size
        for head in range(heads // groups):
            angle = frequencies * (head + group)
            query[group, head] = size * np.cos(angle), -size * np.sin(angle)
    return query.ravel(), key.ravel()


def optimiser(weights: Sequence[WeightLayout], steps: int) -> optax.GradientTransformation:
    """Muon for the layers' matrices, AdamW for the rest; warm-up, plateau, linear decay."""
    decay = int(steps * DECAY)
    schedule = optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, PEAK_LEARNING_RATE, WARMUP),
            optax.schedules.constant_schedule(PEAK_LEARNING_RATE),
            optax.schedules.linear_schedule(PEAK_LEARNING_RATE, 0.0, decay),
        ],
        [WARMUP, steps - decay],
    )
    matrix = optax.contrib.MuonDimensionNumbers()
    by_muon = {
        w.path: matrix if ".layers." in w.path and len(w.axes) == 2 else None for w in weights
    }
    muon = optax.contrib.muon(
        schedule, adam_b2=0.98, consistent_rms=0.2, muon_weight_dimension_numbers=by_muon
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def all_logits(values: dict[str, Array], tokens: Array, config: Qwen2Config) -> Array:
    """Logits of whole rows: int32 [B, T] -> float32 [B, T, V]."""
    params = unflatten(
        (name, Weight((value,), inputs_first="embed_tokens" not in name and value.ndim == 2))
        for name, value in values.items()
    )
    start = jnp.zeros(tokens.shape[0], jnp.int32)
    x, _ = hidden_states(params, tokens, start, None, tokens.shape[1], config, Ops())
    return logits(params, x, Ops())


def answer_loss(values: dict[str, Array], batch: Batch, config: Qwen2Config) -> Array:
    """Mean cross-entropy over the answers' tokens."""
    scores = all_logits(values, jnp.asarray(batch.tokens), config)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch.targets)
    return (losses * batch.weights).sum() / batch.weights.sum()


def train_step(optimise: optax.GradientTransformation, config: Qwen2Config) -> Callable:
    """One jitted update: (weights, state, batch) -> (weights, state, loss)."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(values, state, batch):  # type: ignore[no-untyped-def]
        loss, gradient = jax.value_and_grad(answer_loss)(values, batch, config)
        updates, state = optimise.update(gradient, state, values)
        return optax.apply_updates(values, updates), state, loss

    return step


# Scoring.


def held_out_misses(out: Path, held_out: list[dict[str, str]]) -> list[str]:
    """The greedy answers, by the package's own engine, whose final number is wrong."""
    model = Qwen2ForCausalLM.from_pretrained(out, dtype="bfloat16", max_num_seqs=SCORED_AT_ONCE)
    prompts = [SYSTEM_TURN + turn(problem["question"]) for problem in held_out]
    completions = model.generate(prompts, temperature=0.0, max_new_tokens=MAX_ANSWER)
    return [
        f"{problem['question']} -> {completion.text!r}"
        for problem, completion in zip(held_out, completions, strict=True)
        if completion.text.rpartition("#### ")[2] != problem["answer"].rpartition("#### ")[2]
    ]


# Files.


def write_held_out(problems: ProblemSet, out: Path) -> None:
    """Writes the held-out problems in GSM8K's form."""
    rows = ({"question": p.question, "answer": p.answer} for p in problems.held_out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(
    values: dict[str, Array], config: Qwen2Config, weights: Sequence[WeightLayout], out: Path
) -> None:
    """Writes config.json, generation_config.json and model.safetensors."""
    write_json(out / "config.json", config.to_dict())
    stops = [*config.eos_token_id, config.bos_token_id]
    write_json(
        out / "generation_config.json",
        {"do_sample": False, "eos_token_id": stops, "pad_token_id": config.bos_token_id},
    )
    tensors = {}
    for weight in weights:
        value = np.asarray(values[weight.path].astype(jnp.bfloat16))
        tensors[weight.path] = np.ascontiguousarray(value.T if weight.inputs_first else value)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # written as readable by its owner only


def train(
    problems: ProblemSet,
    tokenizer: Tokenizer,
    config: Qwen2Config,
    weights: Sequence[WeightLayout],
    options: argparse.Namespace,
) -> dict[str, Array]:
    """The training loop; prints the loss, saves the state where asked to."""
    optimise = optimiser(weights, options.steps)
    values = initial_weights(weights, config, options.seed)
    state, step = optimise.init(values), 0
    if options.state and options.state.exists():
        step, leaves = pickle.loads(options.state.read_bytes())
        values, state = jax.tree.unflatten(jax.tree.structure((values, state)), leaves)
        print(f"going on from step {step}")
    update = train_step(optimise, config)
    stream = batches(problems, tokenizer, options.seed, step)
    losses, tokens, began = [], 0, time.monotonic()
    while step < options.steps:
        batch = next(stream)
        values, state, loss = update(values, state, batch)
        losses.append(loss)
        tokens += batch.tokens.size
        step += 1
        if step % 25 == 0 or step == options.steps:
            seconds = time.monotonic() - began
            mean = float(np.mean([float(x) for x in losses]))
            print(
                f"step {step}: loss {mean:.4f}, {tokens / seconds:.0f} tokens/s, {seconds:.0f} s",
                flush=True,
            )
            losses = []
            if options.state and step % 100 == 0:
                leaves = jax.tree.map(np.asarray, jax.tree.leaves((values, state)))
                options.state.write_bytes(pickle.dumps((step, leaves)))
    return values


def make_checkpoint(options: argparse.Namespace) -> None:
    """Trains, and writes the whole folder but its data card."""
    problems = ProblemSet(options.seed)
    write_held_out(problems, options.out)
    texts = tokenizer_texts(problems, options.seed)
    tokenizer = write_tokenizer(texts, VOCABULARY, options.out)
    check_turns(tokenizer)
    end, pad = (tokenizer.encode(token)[0] for token in (IM_END, ENDOFTEXT))
    config = demo_config(end, pad)
    weights = ParallelModel(config, make_mesh("1"), jnp.dtype(jnp.float32)).weights.declared
    values = train(problems, tokenizer, config, weights, options)
    write_model(values, config, weights, options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the embedded demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--state", type=Path, help="file to save the training state in")
    parser.add_argument("--evaluate", action="store_true", help="only score what --out holds")
    options = parser.parse_args()
    if not options.evaluate:
        make_checkpoint(options)
    lines = (options.out / "heldout.jsonl").read_text().splitlines()
    misses = held_out_misses(options.out, [json.loads(line) for line in lines])
    for miss in misses:
        print("wrong:", miss)
    print(f"held out: {len(lines) - len(misses)} of {len(lines)} right")


if __name__ == "__main__":
    main()
