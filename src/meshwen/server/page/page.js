// SPDX-License-Identifier: Apache-2.0
// The chat: what is said and answered, and the buttons and keys around it.

import { by } from "./dom.js";
import { watchEngine } from "./engine.js";
import { parameters } from "./settings.js";
import { ServerError, answer, request } from "./stream.js";
import { AnswerTurn, userTurn } from "./turns.js";

const log = by("log");
const field = by("message");
let messages = []; // Without the system message, which the settings have.
let last = null; // The last answer, or null.
let running = null; // The AbortController of the answer that is being made.
let model = null;

/** Finds out which model there is, and shows its name; an error is shown. */
async function meetModel() {
  try {
    const found = await (await request("v1/models")).json();
    model = found.data[0].id;
    by("model").textContent = document.title = model;
    showError("");
  } catch (error) {
    showError(error.message);
    if (error.status === 401) askForKey();
  }
}

function askForKey() {
  by("settings").open = true;
  by("key").focus();
}

/** Takes the key that was typed: the browser forgets it with the tab. */
function takeKey() {
  const key = by("key").value.trim();
  if (key === sessionStorage.getItem("meshwen-key")) return;
  sessionStorage.setItem("meshwen-key", key);
  model = null;
  meetModel();
}

function showError(text) {
  by("error").hidden = !text;
  by("error").textContent = text.slice(0, 1).toUpperCase() + text.slice(1);
}

const announce = (text) => (by("status").textContent = text);

function showButtons() {
  by("send").hidden = running !== null;
  by("stop").hidden = running === null;
  by("again").disabled = running !== null || !messages.length;
  by("new").disabled = running !== null || !messages.length;
  by("empty").hidden = log.children.length > 1;
}

/** Adds to the conversation; it follows the text while its end is in sight. */
function scrolling(change) {
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (follows) log.scrollTop = log.scrollHeight;
}

/** Says what was typed. */
function send() {
  const text = field.value;
  if (running || !text.trim()) return;
  messages = [...messages, ...(last?.takeResults() ?? [])];
  const before = messages;
  messages = [...before, { role: "user", content: text }];
  const said = userTurn(text);
  log.append(said);
  log.scrollTop = log.scrollHeight;
  field.value = "";
  ask(() => {
    messages = before;
    said.remove();
    field.value ||= text;
  });
}

/** Sends the results of the last answer's tool calls. */
function sendResults() {
  if (running) return;
  messages = [...messages, ...last.takeResults()];
  ask();
}

/** Has the last answer made again. */
function again() {
  if (running) return;
  if (messages.at(-1)?.role === "assistant") {
    messages = messages.slice(0, -1);
    last?.node.remove();
    last = null;
  }
  ask();
}

function startAnew() {
  messages = [];
  last = null;
  log.replaceChildren(by("empty"));
  showError("");
  announce("A new conversation begins.");
  showButtons();
  field.focus();
}

/** Has the conversation answered; `undo` is called where nothing comes of it. */
async function ask(undo = () => {}) {
  showError("");
  const turn = new AnswerTurn(model ?? "Answer");
  const control = (running = new AbortController());
  let frame = 0;
  const draw = () => {
    frame = 0;
    scrolling(() => turn.update());
  };
  let failure = null;
  let stopped = false;
  showButtons();
  try {
    const asked = parameters();
    if (model === null) await meetModel();
    scrolling(() => log.append(turn.node));
    log.setAttribute("aria-busy", "true"); // It is read out when it is whole.
    announce("Answering.");
    const { system, ...others } = asked;
    const all = [...(system ? [{ role: "system", content: system }] : []), ...messages];
    for await (const chunk of answer({ model, messages: all, ...others }, control.signal)) {
      turn.answer.add(chunk);
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    stopped = error.name === "AbortError";
    failure = stopped ? null : error;
  }
  cancelAnimationFrame(frame);
  running = null;
  finish(turn, stopped, failure, undo);
}

function finish(turn, stopped, failure, undo) {
  log.removeAttribute("aria-busy");
  const nothing = turn.answer.empty && turn.answer.finish === null;
  if (nothing) {
    turn.node.remove();
    undo();
  } else {
    messages = [...messages, turn.answer.message()];
    last = turn;
    scrolling(() => turn.end(stopped, sendResults));
  }
  announce(stopped ? "Stopped." : failure ? "" : "The answer is whole.");
  if (failure) showError(explained(failure));
  showButtons();
  if (failure?.status === 401) askForKey();
}

function explained(error) {
  if (error instanceof ServerError) return error.message;
  return error.name === "SettingError" ? error.message : `This page failed: ${error.message}`;
}

const stop = () => running?.abort();

by("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
field.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !running) return;
  stop();
  field.focus();
});
by("stop").addEventListener("click", () => {
  stop();
  field.focus();
});
by("again").addEventListener("click", again);
by("new").addEventListener("click", startAnew);

by("key").value = sessionStorage.getItem("meshwen-key") ?? "";
by("key").addEventListener("change", takeKey);
by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  takeKey();
});
showButtons();
field.focus({ preventScroll: true });
await meetModel();
watchEngine();
