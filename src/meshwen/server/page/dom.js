// SPDX-License-Identifier: Apache-2.0
// Elements, made of text alone: nothing here, or in what uses it, reads text as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element of the page with this id. */
export const by = (id) => document.getElementById(id);

/** A new element; children are nodes or text. */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** A new element of an SVG picture. */
export function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A button that does something when it is pressed. */
export function button(text, label, press) {
  const made = element("button", { type: "button", class: "small", "aria-label": label }, text);
  made.addEventListener("click", press);
  return made;
}

/** A button that copies what `text()` is then, and says so. */
export function copyButton(label, text) {
  const made = button("Copy", label, async () => {
    made.textContent = (await copied(text())) ? "Copied" : "Not copied";
    setTimeout(() => (made.textContent = "Copy"), 1500);
  });
  return made;
}

/** Whether the text is on the clipboard; over plain HTTP browsers have the older way alone. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = element("textarea", { class: "hidden", "aria-hidden": "true" });
    const before = document.activeElement;
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    before?.focus();
    return done;
  }
}
