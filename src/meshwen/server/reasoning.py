# SPDX-License-Identifier: Apache-2.0
"""What a model thought before it answered: `<think>...</think>`, as Qwen3 and DeepSeek-R1 write it.

It is told apart only at the beginning of an answer; `<think>` further on is content. Some chat
templates open it in the prompt: then the answer begins within. The line ends beside the tags are
theirs, as in these models' chat templates. An answer that ends before `</think>` is all reasoning.
"""

from __future__ import annotations

from dataclasses import replace

from meshwen.server.parsing import OutputParser, Parsed, possible_start

OPENING, CLOSING = "<think>", "</think>"


class Reasoning:
    """Parses the reasoning out of one answer, and has another parser do the rest.

    Args:
        rest: for what follows the reasoning.
        inside: the prompt has opened it.
    """

    def __init__(self, rest: OutputParser, inside: bool = False):
        self._rest = rest
        self._step = self._inside if inside else self._before
        self._text = ""  # What is not decided yet.
        self._begun = False  # Some reasoning was given out.

    @property
    def called_tools(self) -> bool:
        """Whether a tool call has begun."""
        return self._rest.called_tools

    def push(self, text: str) -> Parsed:
        """Takes more of the text; returns what is certain by now and was not returned before."""
        return self._step(text)

    def finish(self) -> Parsed:
        """Ends the text; returns the rest."""
        if self._step == self._inside:
            return Parsed(reasoning=self._text)
        if self._step == self._before and self._text:
            self._step = self._rest.push
            found = self._rest.push(self._text)
            last = self._rest.finish()
            return Parsed(found.content + last.content, "", found.tool_calls + last.tool_calls)
        return self._rest.finish()

    def _before(self, text: str) -> Parsed:
        """Looks for the opening tag, after white space at most."""
        self._text += text
        found = self._text.lstrip()
        if found.startswith(OPENING):
            self._step, self._text = self._inside, ""
            return self._inside(found.removeprefix(OPENING))
        if OPENING.startswith(found):
            return Parsed()
        self._step = self._rest.push
        return self._rest.push(self._text)

    def _inside(self, text: str) -> Parsed:
        """Gives out reasoning, up to the closing tag."""
        self._text += text
        if not self._begun:
            self._text = self._text.lstrip("\n")
        at = self._text.find(CLOSING)
        if at < 0:
            at = possible_start(self._text, (CLOSING,))
            at = len(self._text[:at].rstrip("\n"))
            return Parsed(reasoning=self._cut(at))
        reasoning = self._cut(at).rstrip("\n")
        text, self._text = self._text.removeprefix(CLOSING), ""
        self._step = self._after
        return replace(self._after(text), reasoning=reasoning)

    def _cut(self, at: int) -> str:
        found, self._text = self._text[:at], self._text[at:]
        self._begun |= bool(found)
        return found

    def _after(self, text: str) -> Parsed:
        """Drops the line ends after the closing tag."""
        if not (text := text.lstrip("\n")):
            return Parsed()
        self._step = self._rest.push
        return self._rest.push(text)
