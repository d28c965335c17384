// SPDX-License-Identifier: Apache-2.0
// The parameters of a request, as the page's fields have them.

import { by } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** A field whose value a request cannot have. */
class SettingError extends Error {
  constructor(field, message) {
    super(message);
    this.name = "SettingError";
    by("settings").open = true;
    field.focus();
  }
}

/** What was filled in: the system message as `system`, the rest as requests have it. */
export function parameters() {
  const found = {};
  for (const name of NUMBERS) {
    const field = by(name);
    const label = field.labels[0].firstChild.textContent.trim();
    if (!field.checkValidity()) throw new SettingError(field, `${label}: ${field.validationMessage}`);
    if (field.value !== "") found[name] = field.valueAsNumber;
  }
  const stop = by("stop-strings").value.split("\n").filter((line) => line !== "");
  if (stop.length) found.stop = stop;
  const tools = readTools(by("tools"));
  if (tools) found.tools = tools;
  return { system: by("system").value, ...found };
}

function readTools(field) {
  if (!field.value.trim()) return null;
  try {
    const tools = JSON.parse(field.value);
    return Array.isArray(tools) ? tools : [tools];
  } catch (error) {
    throw new SettingError(field, `Tools must be JSON: ${error.message}`);
  }
}
