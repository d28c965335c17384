# SPDX-License-Identifier: Apache-2.0
"""A model that takes no time to compile, and its greedy answers in float64."""

import functools
from dataclasses import replace

import numpy as np

import reference
from meshwen.models.qwen2 import Qwen2Config

# No mesh divides its vocabulary or heads; one layer sees everything, the other a few tokens.
TINY = Qwen2Config(
    vocab_size=263,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=1100,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    layer_types=("full_attention", "sliding_attention"),
    sliding_window=6,
)
# Where one kind of layer is enough: a second layer doubles what a program takes to compile.
ONE_LAYER = replace(TINY, num_hidden_layers=1, layer_types=("sliding_attention",))
# Where it must show whose keys and values are there: the last layer's follow from the tokens before
# them, and all tokens behind see them.
FULL_LAST = replace(TINY, layer_types=TINY.layer_types[::-1])
FULL_LAYER = replace(ONE_LAYER, layer_types=("full_attention",))
STEPS = 6


@functools.cache
def weights():
    return reference.random_weights(TINY)


@functools.cache
def greedy(prompt: tuple[int, ...]) -> tuple[tuple[int, ...], np.ndarray]:
    """`STEPS` likeliest tokens, and their log-probabilities in float64."""
    tokens, logprobs = list(prompt), []
    for _ in range(STEPS):
        scores = reference.logits(weights(), TINY, tokens)[-1]
        tokens.append(int(np.argmax(scores)))
        logprobs.append(scores.max() - np.log(np.exp(scores - scores.max()).sum()) - scores.max())
    return tuple(tokens[len(prompt) :]), np.array(logprobs)
