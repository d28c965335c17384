# SPDX-License-Identifier: Apache-2.0
"""What engines are asked in `serving.py`, as token ids, so that all get the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from meshwen.checkpoints import open_checkpoint
from meshwen.evals.gsm8k import question
from meshwen.evals.problems import read_problems
from meshwen.evals.styles import Problem, prompt_style, shots
from meshwen.tokenizer.tokenizer import Tokenizer

CHATS, TURNS = 2, 10
_ADDED, _ANSWERED = 50, 50  # tokens of a turn, with what frames them
_WARM_UP = 32  # problems at most, beyond those that count


class Measurement(NamedTuple):
    """What to measure: a method of an engine and its arguments.

    Attributes:
        name: what to call it.
        method: of the engine.
        arguments: of the method.
    """

    name: str
    method: str
    arguments: dict[str, Any]


class Workloads:
    """The scenarios for one model.

    Args:
        model: the checkpoint's folder.
        data: GSM8K's folder, with test.jsonl and train.jsonl.
        problems: how many problems to answer.
        steps: of decoding, and prompts to prefill, of which the median counts.
    """

    def __init__(self, model: str, data: Path, problems: int, steps: int):
        with open_checkpoint(model) as checkpoint:
            tokenizer = Tokenizer.from_checkpoint(checkpoint)
        assert tokenizer is not None
        self._tokenizer, self._steps, self._problems = tokenizer, steps, problems
        self._test = read_problems(data / "test.jsonl")
        self._train = read_problems(data / "train.jsonl")

    def decode(self) -> Iterator[Measurement]:
        """Steps of 1, 8 and 32 answers after few and many tokens, and a prompt."""
        for length in (128, 2048):
            for batch in (1, 8, 32):
                arguments = {"batch": batch, "length": length, "steps": self._steps}
                yield Measurement(f"batch {batch} after {length}", "decode_steps", arguments)
        yield from self.prefill()

    def prefill(self) -> Iterator[Measurement]:
        """A prompt of 512 tokens that is new, and one that was read before."""
        arguments = {"length": 512, "runs": min(self._steps, 5)}
        yield Measurement("prefill 512", "prefill", arguments)
        yield Measurement("prefill 512 again", "prefill_again", arguments)

    def chat(self) -> Iterator[Measurement]:
        """The last turn of a conversation, of which an engine may have cached all that is before.

        Conversations have nothing in common but their system message; the last one counts.
        """
        arguments = {
            "conversations": [self._conversation(TURNS * chat) for chat in range(CHATS)],
            "limit": _ANSWERED,
        }
        yield Measurement(f"turn {TURNS}", "chat", arguments)

    def few_shot(self) -> Iterator[Measurement]:
        """Problems after the same five solved ones, as texts."""
        style = prompt_style("lm-eval")
        [examples] = shots(style, self._train, 1)
        yield self._answers("five-shot", style.name, examples, style.max_new_tokens)

    def answers(self) -> Iterator[Measurement]:
        """Problems as conversations."""
        yield self._answers("zero-shot", "qwen-boxed", [], 256)

    def arrivals(self) -> Iterator[Measurement]:
        """Long prompts arrive while answers run."""
        arguments = {"running": 4, "prompts": 3, "length": 4096}
        yield Measurement("p95 between tokens", "arrivals", arguments)

    def memory(self) -> Iterator[Measurement]:
        """Many short sequences and a long one."""
        arguments = {"short": 32, "short_length": 1024, "long_length": 16_384}
        yield Measurement("cache bytes over needed", "memory", arguments)

    def _answers(
        self, name: str, style_name: str, examples: list[Problem], limit: int
    ) -> Measurement:
        style = prompt_style(style_name)
        problems = self._test[: self._problems + min(_WARM_UP, self._problems)]
        prompts = [list(question(p, style, examples, self._tokenizer).token_ids) for p in problems]
        # Solved examples are new to the engine when it counts.
        other = shots(style, self._train, 2)[1] if examples else []
        warm_up = [
            list(question(p, style, other, self._tokenizer).token_ids)
            for p in problems[self._problems :]
        ]
        arguments = {
            "prompts": prompts[: self._problems],
            "warm_up": warm_up,
            "limit": limit,
            "stop": list(style.stop) if not style.conversation else [],
        }
        return Measurement(f"{self._problems} problems {name}", "answer", arguments)

    def _conversation(self, first: int) -> list[list[int]]:
        """What a user adds at each turn, framed: problems from one on, each `_ADDED` tokens."""
        return [self._turn(first + turn, new=turn == 0) for turn in range(TURNS)]

    def _turn(self, number: int, *, new: bool) -> list[int]:
        encode = self._tokenizer.encode
        before = "<|im_start|>user\n" if new else "<|im_end|>\n<|im_start|>user\n"
        if new:
            before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + before
        after = encode("<|im_end|>\n<|im_start|>assistant\n")
        framed = [*encode(before), *encode(self._test[number].question)]
        return [*framed[: _ADDED - len(after)], *after]
