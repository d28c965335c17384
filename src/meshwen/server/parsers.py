# SPDX-License-Identifier: Apache-2.0
"""Which parser the answers to a request have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from meshwen.server.options import ServerOptions
from meshwen.server.parsing import OutputParser, PlainText
from meshwen.server.reasoning import CLOSING, OPENING, Reasoning
from meshwen.server.serving import Serving
from meshwen.server.tool_calls import FENCES, TAGS, ToolCalls
from meshwen.tokenizer.tokenizer import Tokenizer

_STYLES = {"qwen2_5": (TAGS, False), "qwen_coder_fenced": (FENCES, True)}
_TAIL_TOKENS = 16  # More than any tokenizer makes of <think> and the line ends after it.


def parser_of(
    serving: Serving,
    prompt_tokens: Sequence[int],
    tools: Collection[str] = (),
    *,
    most_calls: int | None = None,
    constrained: bool = False,
) -> Callable[[], OutputParser]:
    """What makes a parser for each answer to a prompt.

    Args:
        serving: the model.
        prompt_tokens: the prompt, which may have begun the reasoning.
        tools: names of the tools that may be called; none: no text is a call.
        most_calls: calls beyond so many are content; None: none is.
        constrained: the answer is held to a grammar from its first token, so it has no reasoning.
    """
    options, tokenizer = serving.options, serving.tokenizer
    style = _STYLES.get(options.tool_call_parser) if tools else None
    reasons = not constrained and _reasons(options, tokenizer)
    inside = reasons and _inside(tokenizer, prompt_tokens)

    def make() -> OutputParser:
        rest = ToolCalls(tools, *style, most_calls) if style else PlainText()
        return Reasoning(rest, inside) if reasons else rest

    return make


def _reasons(options: ServerOptions, tokenizer: Tokenizer | None) -> bool:
    """Whether answers may begin with reasoning."""
    if options.reasoning_parser != "auto" or tokenizer is None:
        return options.reasoning_parser == "think"
    return any(CLOSING in template for template in tokenizer.chat_templates)


def _inside(tokenizer: Tokenizer | None, prompt_tokens: Sequence[int]) -> bool:
    """Whether a prompt ends where reasoning has begun."""
    if tokenizer is None:
        return False
    tail = tokenizer.decode(prompt_tokens[-_TAIL_TOKENS:], skip_special_tokens=False)
    return tail.rstrip().endswith(OPENING)


def thinking_switch(serving: Serving) -> tuple[bool, ...]:
    """Whether the model can be told to think before it answers, and not to."""
    if not _reasons(serving.options, serving.tokenizer):
        return (False,)
    templates = serving.tokenizer.chat_templates if serving.tokenizer else ()
    return (True, False) if any("enable_thinking" in one for one in templates) else (True,)
