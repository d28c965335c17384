# SPDX-License-Identifier: Apache-2.0
"""Texts of answers, cut into pieces, for tests of what parses them."""

from itertools import pairwise

from hypothesis import strategies as st

from meshwen.server.parsing import OutputParser, Parsed

# A chat template that shows all that a request may ask of one; THINKING opens with reasoning.
TEMPLATE = (
    "{% if tools %}tools:{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' }}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = TEMPLATE + "{% if enable_thinking is not false %}<think>\n{% else %}</think>{% endif %}"
CUTS = st.lists(st.integers(0, 1 << 16), max_size=12)


def call(name: str, arguments: str) -> str:
    """A call as Qwen2.5's chat template has it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def outputs(parser: OutputParser, text: str, cuts: list[int] | None = None) -> list[Parsed]:
    """All that a parser gives for a text that is cut at places; None: into characters."""
    at = range(len(text)) if cuts is None else sorted(cut % (len(text) + 1) for cut in cuts)
    parts = [text[a:b] for a, b in pairwise([0, *at, len(text)])]
    return [*(parser.push(part) for part in parts), parser.finish()]
