// SPDX-License-Identifier: Apache-2.0
// What was said, as elements of the conversation.

import { copyButton, element } from "./dom.js";
import { codeBlock, show } from "./markdown.js";

/** What a user said. */
export function userTurn(text) {
  return turn("user", "You", element("div", { class: "said" }, text));
}

function turn(kind, who, ...children) {
  const head = element("div", { class: "who" }, who);
  return element("article", { class: `turn ${kind}`, "aria-label": who }, head, ...children);
}

/** What has come of an answer: chunks of a stream, put together. */
export class Answer {
  constructor() {
    this.content = this.reasoning = "";
    this.calls = [];
    this.finish = this.usage = null;
    this.began = performance.now();
    this.first = this.last = null;
  }

  get empty() {
    return !this.content && !this.reasoning && !this.calls.length;
  }

  /** Adds a chunk. */
  add(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const delta = choice.delta ?? {};
    this.content += delta.content ?? "";
    this.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
    for (const piece of delta.tool_calls ?? []) {
      const call = (this.calls[piece.index] ??= { id: "", name: "", arguments: "" });
      call.id ||= piece.id ?? "";
      call.name += piece.function?.name ?? "";
      call.arguments += piece.function?.arguments ?? "";
    }
    this.finish = choice.finish_reason ?? this.finish;
    if (!this.empty) this.first ??= performance.now();
    this.last = performance.now();
  }

  /** As the message of a conversation. */
  message() {
    const calls = this.calls.map(({ id, name, arguments: text }) => ({
      id,
      type: "function",
      function: { name, arguments: text },
    }));
    return {
      role: "assistant",
      content: this.content,
      ...(calls.length ? { tool_calls: calls } : {}),
    };
  }

  /** How it ended, and how fast it came. */
  summary(stopped) {
    const tokens = this.usage?.completion_tokens;
    const parts = [];
    if (stopped) parts.push("stopped");
    if (this.finish === "length") parts.push("cut off at the limit of tokens");
    if (tokens) {
      parts.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
      const seconds = (this.last - this.first) / 1000;
      const rate = (tokens - 1) / seconds;
      if (tokens > 1 && seconds > 0) parts.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
    }
    if (this.first) parts.push(`first after ${((this.first - this.began) / 1000).toFixed(2)} s`);
    return parts.join(", ");
  }
}

/** An answer's place in the conversation. */
export class AnswerTurn {
  constructor(name) {
    this.answer = new Answer();
    this.reasoning = element("div");
    this.thought = element("details", { class: "reasoning", open: "" },
      element("summary", {}, "Reasoning"), this.reasoning);
    this.thought.hidden = true;
    this.text = element("div", { class: "text" });
    this.calls = element("div");
    this.note = element("div", { class: "note waiting" });
    this.node = turn("assistant", name, this.thought, this.text, this.calls, this.note);
    this.results = [];
  }

  /** Shows what has come so far. */
  update() {
    const { content, reasoning, calls } = this.answer;
    this.thought.hidden = !reasoning;
    this.reasoning.textContent = reasoning;
    show(this.text, content);
    this.calls.replaceChildren(...calls.map((call) => callBlock(call)));
  }

  /** Shows the whole answer, with its buttons and, under calls, fields for their results. */
  end(stopped, sendResults) {
    this.update();
    this.thought.open = !this.answer.content;
    this.note.className = "note";
    this.note.textContent = this.answer.summary(stopped);
    this.node.firstChild.append(copyButton("Copy the answer", () => this.answer.content));
    if (!this.answer.calls.length) return;
    this.results = this.answer.calls.map((call) => ({ id: call.id, field: resultField() }));
    this.results.forEach(({ field }, at) =>
      this.calls.children[at].append(element("label", {}, "Result", field)));
    const send = element("button", { type: "button" }, "Send the results");
    send.addEventListener("click", sendResults);
    this.calls.append(send);
  }

  /** The results that were typed, as messages; they can then be changed no more. */
  takeResults() {
    const messages = this.results.map(({ id, field }) => {
      field.readOnly = true;
      return { role: "tool", tool_call_id: id, content: field.value };
    });
    if (messages.length) this.calls.lastChild.remove();
    this.results = [];
    return messages;
  }
}

function callBlock({ name, arguments: text }) {
  return element("div", { class: "call" },
    element("div", { class: "name" }, `Calls ${name}`), codeBlock(pretty(text), "arguments"));
}

const resultField = () => element("textarea", { rows: "1", spellcheck: "false" });

/** JSON with indents; what is none, or not yet, as it is. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
