# SPDX-License-Identifier: Apache-2.0
"""Tool calls as Qwen2.5 writes them.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

A call begins as soon as its name is read and is a tool's, and its arguments have begun as an
object: from then on it is streamed, the arguments as the model wrote them. What turns out before
that to be no such JSON is content, tag and all.

Arguments may turn out to be no JSON after they have begun. Nothing can be taken back then, so the
call ends there: its arguments stay incomplete, as they do where an answer ends at a limit, and
what follows is content. This does not depend on streaming.

The JSON says where a call ends, not the closing tag: arguments may quote the tag. A missing or
supernumerary last brace, and a missing closing tag, are forgiven once the arguments are whole.

Qwen2.5-Coder also writes calls as fenced blocks, within `<tools>`, or bare, with nothing about
their JSON. Others write such JSON as an answer, so these are calls only where that is asked for.

White space that alone fills the gap before, between or after calls is theirs, and so is one line
end between content and a call: chat templates write it, so that an answer that comes back in a
later request is found in the cache of prefixes.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from meshwen.server.json_prefix import SPACE, JsonPrefix
from meshwen.server.parsing import Parsed, ToolCallDelta, new_id, possible_start

# What opens a call, and what closes it.
TAGS = {"<tool_call>": "</tool_call>"}
FENCES = {**TAGS, "```json": "```", "<tools>": "</tools>"}


class ToolCalls:
    """Parses the tool calls out of one answer.

    Args:
        names: of the tools; None: any text is one.
        marks: what opens a call, with what closes it.
        bare: nothing need open a call that only white space, or calls, come before.
        most: calls beyond so many are content; None: none is.
    """

    def __init__(
        self,
        names: Collection[str] | None = None,
        marks: dict[str, str] = TAGS,
        bare: bool = False,
        most: int | None = None,
    ):
        self._names, self._marks, self._may_be_bare, self._most = names, marks, bare, most
        self._text = ""  # What is not decided yet.
        self._space = ""  # White space before it, which may be a call's.
        self._bare = True  # Nothing but white space has come since the last call.
        self._mark = self._candidate = ""  # What opened a call; all of it, until it begins.
        self._call: _Call | None = None
        self._closing = False  # The call's object is whole.
        self._begun = 0
        self._id = ""
        self._content, self._deltas = "", list[ToolCallDelta]()
        self._later = ""  # Content that came after calls: it goes out by the next push.

    @property
    def called_tools(self) -> bool:
        """Whether a tool call has begun."""
        return self._begun > 0

    def push(self, text: str) -> Parsed:
        """Takes more of the text; returns what is certain by now and was not returned before."""
        self._text += text
        while self._step():
            pass
        return self._take()

    def finish(self) -> Parsed:
        """Ends the text; returns the rest of the content."""
        if self._closing:
            text = self._text if self._unclosed() else ""
        elif self._call is not None and not self._call.begun:
            text = self._candidate
        else:
            text = self._text
        self._show(text)
        if not (self._bare and self.called_tools):
            self._put(self._space)
        self._content, self._later = self._content + self._later, ""
        return self._take()

    def _take(self) -> Parsed:
        parsed = Parsed(content=self._content, tool_calls=tuple(self._deltas))
        self._content, self._later = self._later, ""
        self._deltas.clear()
        return parsed

    def _step(self) -> bool:
        """Decides on more of the text; returns whether there may be more to decide."""
        if self._closing:
            return self._close()
        return self._look_for_call() if self._call is None else self._go_on(self._call)

    def _look_for_call(self) -> bool:
        may_call = self._most is None or self._begun < self._most
        marks = tuple(self._marks) if may_call else ()
        if may_call and self._may_be_bare and self._bare and self._text.lstrip()[:1] == "{":
            return self._open("", self._text.index("{"))
        found = {mark: at for mark in marks if (at := self._text.find(mark)) >= 0}
        if not found:
            at = possible_start(self._text, marks)
            self._show(self._text[:at])
            self._text = self._text[at:]
            return False
        mark = min(found, key=found.__getitem__)
        return self._open(mark, found[mark])

    def _open(self, mark: str, at: int) -> bool:
        """Begins to read what may be a call."""
        self._show(self._text[:at])
        self._mark = self._candidate = mark
        self._text = self._text[at + len(mark) :]
        self._call = _Call(self._names)
        return True

    def _go_on(self, call: _Call) -> bool:
        """Reads the call's JSON."""
        begun, taken = call.begun, 0
        for char in self._text:
            if call.ended or not call.push(char):
                break
            taken += 1
        read, self._text = self._text[:taken], self._text[taken:]
        if call.begun:
            self._add(call, first=not begun)
        else:
            self._candidate += read
        if call.ended or (self._text and call.begun and call.whole):
            self._closing = True
        elif self._text:  # The JSON breaks here.
            self._call = None
            if not call.begun:
                mark = self._mark or "{"
                self._text = self._candidate[len(mark) :] + self._text
                self._show(mark)
        return self._closing or bool(self._text)

    def _add(self, call: _Call, first: bool) -> None:
        if first:
            self._id = new_id("call_")
            if not self._bare:
                self._put(self._space.removesuffix("\n"))
            self._space, self._bare = "", True
            self._begun += 1
            self._deltas.append(ToolCallDelta(self._begun - 1, self._id, call.name, ""))
        if piece := call.take():
            self._deltas.append(ToolCallDelta(self._begun - 1, self._id, None, piece))

    def _unclosed(self) -> str:
        """The text after a call's arguments, without what may come before the closing tag."""
        return self._text.lstrip(SPACE + "}")

    def _close(self) -> bool:
        """Drops the closing tag, where it comes."""
        rest, closing = self._unclosed(), self._marks.get(self._mark, "")
        if closing.startswith(rest) and rest != closing:
            return False
        self._text = rest.removeprefix(closing) if rest.startswith(closing) else self._text
        self._call, self._closing = None, False
        return True

    def _show(self, text: str) -> None:
        """Puts text into the content, but white space at its end, which may be a call's."""
        if kept := text.rstrip():
            self._put(self._space + kept)
            self._space, self._bare = "", False
        self._space += text[len(kept) :]

    def _put(self, content: str) -> None:
        if self._deltas:
            self._later += content
        else:
            self._content += content


class _Call:
    """A call's JSON as it comes.

    Args:
        names: of the tools; None: any text is one.

    Attributes:
        name: the function's, once read.
        begun: name and arguments are known, these at least in their beginning.
        whole: the arguments are whole.
        ended: so is the object about them.
    """

    def __init__(self, names: Collection[str] | None):
        self._names = names
        self._json = JsonPrefix()
        self._member: str | None = None  # The name of the object's member that is being read.
        self._seen: set[str] = set()
        self._read = ""  # That name, or the member's value.
        self._arguments = ""  # What was not taken of them yet.
        self.name: str | None = None
        self.begun = self.whole = self.ended = False

    def take(self) -> str:
        """Returns what has come of the arguments since the last time."""
        piece, self._arguments = self._arguments, ""
        return piece

    def push(self, char: str) -> bool:
        """Takes a character; returns whether this may still become a call: if not, stop."""
        depth, state = self._json.depth, self._json.state
        written = self._json.push(char)
        if written is None or (depth == 0 and char not in SPACE + "{"):
            return False
        if depth <= 1 and state in ("name", "next name", "value") and char not in SPACE:
            self._read = ""
        # All of an argument's text is kept once: what has been taken is not needed again.
        if self._member == "arguments" and (depth > 1 or self._json.depth > 1):
            self._arguments += written
        elif self._member in (None, "name"):
            self._read += written
        return self._structure(char, depth, state)

    def _structure(self, char: str, depth: int, state: str) -> bool:
        """Notes the beginnings and ends of the object's members."""
        after = self._json.state
        if depth == 1 and state == "value" and char not in SPACE:
            return self._begin(char)
        if depth == 1 and state == "string" and after == "colon":
            return self._named(json.loads(self._read))
        if (self._json.depth, after) == (1, "after") and (depth == 2 or state != "after"):
            return self._end()
        if after == "next name" and depth == 1:
            self._member = None
        if depth == 1 and self._json.depth == 0:
            return self._finish()
        return True

    def _named(self, member: str) -> bool:
        new = member not in self._seen
        self._seen.add(member)
        self._member = member
        return new

    def _begin(self, char: str) -> bool:
        """A member's value begins."""
        if self._member == "arguments":
            self.begun = self.name is not None and char == "{"
            return char in "{n"
        return self._member != "name" or char == '"'

    def _end(self) -> bool:
        """A member's value has ended, unless it was a number."""
        if self._member == "arguments":
            self.whole = bool(self._arguments) or self.begun
        elif self._member == "name":
            self.name = json.loads(self._read)
            known = self._names is None or self.name in self._names
            self.begun = known and self.whole
            return known
        return True

    def _finish(self) -> bool:
        """The object has ended."""
        if self.name is None:
            return False
        if not self.begun:
            self._arguments = "{}"
        self.begun = self.whole = self.ended = True
        return True
