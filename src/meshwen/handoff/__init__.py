# SPDX-License-Identifier: Apache-2.0
"""A model as programs for other stacks: to lower, shard, export, differentiate and plug in.

    from meshwen.handoff import parallel_model, program

    model = parallel_model("qwen2.5-7b", AbstractMesh((8,), ("X",)), dtype="bfloat16")
    decode = program("decode", model, profile="portable", batch=1, length=1024)
    print(decode.lower().as_text())

`docs/hardware.md` has more.
"""

from meshwen.handoff.plain import plain_params, typed_params
from meshwen.handoff.programs import Program, parallel_model, program
from meshwen.handoff.training import folded, forward, global_norm
from meshwen.handoff.weights import load_weights

__all__ = [
    "Program",
    "folded",
    "forward",
    "global_norm",
    "load_weights",
    "parallel_model",
    "plain_params",
    "program",
    "typed_params",
]
