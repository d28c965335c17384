# SPDX-License-Identifier: Apache-2.0
"""The sampler's digests, which processors are compared by, are those of what is drawn."""

import numpy as np

from digests import digest, sampler_digests, sampler_logits
from meshwen.ops.cpu.xla import XlaOnCpu
from meshwen.ops.numerics.exact import Exact
from meshwen.ops.operations import Ops


def test_the_digest_of_greedy_tokens_is_that_of_the_likeliest_ones():
    found = sampler_digests(Ops(numerics=Exact(), backend=XlaOnCpu()))
    likeliest = np.asarray(sampler_logits()).argmax(axis=1).astype(np.int32)
    assert found["tokens, greedy"] == digest(likeliest)
    assert "likeliest, greedy" in found
    assert len(set(found.values())) == len(found)
