# SPDX-License-Identifier: Apache-2.0
"""Another stack's activations against this model's: the first that is wrong, and where it was made.

Each activation of the file is compared twice, with what this model's operation gives

- from the tokens: all that comes before is this model's, so the difference is that of all of it;
- from the file's inputs: all that comes before is the file's, so the operation is judged alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jax import Array

from meshwen.engine.runner import ModelRunner
from meshwen.models.parallel_model import ParallelModel
from meshwen.parallel.distributed import to_host
from meshwen.verify.activation_file import Activations
from meshwen.verify.metrics import Distance, distance
from meshwen.verify.operations import (
    LOGITS,
    Operation,
    layer_outputs,
    modules,
    norms,
)
from meshwen.verify.recording import recorded
from meshwen.weights.declaration import Params
from meshwen.weights.layout import WeightTable

# Of the largest value at a position: what rounding to a dtype gives one operation, and what a whole
# model's roundings add up to, with room.
TOLERANCES = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 0.25}
PCC = 0.99


@dataclass(frozen=True)
class Finding:
    """One activation of the file, against this model's.

    Attributes:
        operation: what gave it.
        module: its name in the file.
        dtype: in the file.
        from_tokens: against this model's whole forward pass.
        from_inputs: against this model's operation, computed from the file's activations.
        missing: earlier operations that `from_inputs` had to take from this model, as the file
            lacks them: what they did wrong there shows here.
        tolerance: the largest `relative` that is allowed.
        pcc: the least correlation that is.
    """

    operation: Operation
    module: str
    dtype: str
    from_tokens: Distance
    from_inputs: Distance
    missing: tuple[Operation, ...]
    tolerance: float
    pcc: float

    @property
    def outside(self) -> bool:
        """Whether it leaves the tolerance, wherever that was caused."""
        return self._leaves(self.from_tokens)

    @property
    def wrong_alone(self) -> bool:
        """Whether its operation, or a missing one, makes an error beyond the tolerance."""
        return self._leaves(self.from_inputs)

    def _leaves(self, found: Distance) -> bool:
        # NaN leaves it too.
        return not (found.relative <= self.tolerance and found.pcc >= self.pcc)


def compare_activations(
    runner: ModelRunner, theirs: Activations, tolerance: float | None, pcc: float
) -> list[Finding]:
    """Runs the file's tokens, and compares every activation of the file.

    Args:
        runner: the model that is right.
        theirs: the file.
        tolerance: the largest relative difference that is allowed; None: by the coarser dtype of
            the file's activation and of the model, see `TOLERANCES`.
        pcc: the least Pearson correlation that is.

    Returns:
        In the order of the forward pass.
    """
    weights = runner.model.weights
    names = {operation: module for module, operation in modules(weights).items()}
    missing = missing_inputs(weights, theirs.values)
    from_tokens, from_inputs = _distances(runner, theirs)
    found = []
    for operation, values in theirs.values.items():
        dtype = values.dtype.name
        allowed = tolerance
        if allowed is None:
            allowed = max(TOLERANCES.get(kind, 0) for kind in (dtype, runner.dtype.name))
        one = Finding(
            operation,
            names[operation],
            dtype,
            from_tokens[operation],
            from_inputs[operation],
            missing[operation],
            allowed,
            pcc,
        )
        found.append(one)
    return found


def first_outside(found: Sequence[Finding]) -> Finding | None:
    """The first activation that leaves the tolerance; None where there is none."""
    return next((one for one in found if one.outside), None)


def made_errors(found: Sequence[Finding]) -> list[Finding]:
    """The activations at which an error is made, not inherited.

    Where operations are missing, the first error after them may be theirs; what follows, until the
    file has the residual stream again, proves nothing and is left out.
    """
    made: list[Finding] = []
    for one in found:
        blamed = {other.missing[0] for other in made if other.missing}
        if one.wrong_alone and not blamed.intersection(one.missing[:1]):
            made.append(one)
    return made


def missing_inputs(
    weights: WeightTable, values: Mapping[Operation, np.ndarray]
) -> dict[Operation, tuple[Operation, ...]]:
    """Of each operation those that its inputs depend on and that `values` lacks.

    Counted from where `values` last had the whole residual stream: the embedding, or the output of
    a layer.
    """
    normed, outputs = norms(weights), set(layer_outputs(weights).values())
    stream: tuple[Operation, ...] = ()  # What is missing in the residual stream.
    read: tuple[Operation, ...] = ()  # And in what the latest norm gave.
    found = {}
    for operation in modules(weights).values():
        if operation in normed:
            found[operation] = stream
            read = () if operation in values else stream
        elif operation in outputs:
            found[operation] = stream
            stream = () if operation in values else stream
        else:
            found[operation] = read
            stream = stream if operation in values else (*stream, operation)
    return found


def _distances(
    runner: ModelRunner, theirs: Activations
) -> tuple[dict[Operation, Distance], dict[Operation, Distance]]:
    """How far this model's are from the file's: computed from the tokens, and from its inputs."""
    operations = {operation.key: operation for operation in theirs.values}

    def activations_step(
        params: Params,
        token_ids: Array,
        given: dict[str, Array],
        go_on_with_given: Array,
        *,
        model: ParallelModel,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        by_operation = {operations[key]: values for key, values in given.items()}
        found = recorded(
            params, token_ids, model, given=by_operation, go_on_with_given=go_on_with_given
        )
        # XLA leaves logits out that nobody asks for: no other activation takes as much memory.
        logits = {key: found[LOGITS] for key in operations if key == LOGITS.key}
        return {key: found[operations[key]] for key in given}, logits

    program = runner.compiled(
        activations_step,
        ("batch length", "batch length embed", ""),
        ("batch length embed", "batch length vocab"),
    )

    def run(go_on_with_given: bool) -> dict[Operation, Distance]:
        parts = []
        for token_ids, given in _groups(theirs, runner.plan.data_devices):
            values, logits = program(runner.params, token_ids, given, np.bool_(go_on_with_given))
            parts.append({key: to_host(value) for key, value in values.items()})
            for key, value in logits.items():
                parts[-1][key] = to_host(value)[..., : runner.config.vocab_size]
        found = {}
        for key, operation in operations.items():
            ours = np.concatenate([part.pop(key) for part in parts])[: len(theirs.input_ids)]
            found[operation] = distance(ours, theirs.values[operation])
        return found

    return run(False), run(True)


def _groups(theirs: Activations, size: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The prompts, so many at a time: tokens, and activations but the logits, in float32."""
    count = len(theirs.input_ids)
    for first in range(0, count, size):
        rows = np.minimum(np.arange(first, first + size), count - 1)
        given = {
            operation.key: values[rows].astype(np.float32)
            for operation, values in theirs.values.items()
            if operation != LOGITS
        }
        yield theirs.input_ids[rows], given
