// SPDX-License-Identifier: Apache-2.0
// Markdown as models write it, to elements: headings, lists, tables, quotes, code, emphasis, links.
// What is no Markdown, HTML among it, is shown as it was written. Images are links: none is fetched.

import { copyButton, element } from "./dom.js";

const DEEPEST = 8; // lists and quotes within each other, and emphasis
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)(.*)$/;
const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** Shows a text in an element that is this function's own; what has not changed since stays. */
export function show(container, text) {
  const found = blocks(text.replace(/\r\n?/g, "\n").split("\n"));
  found.forEach((block, at) => {
    const source = block.lines.join("\n");
    const before = container.children[at];
    if (before?.markdown === source) return;
    const made = rendered(block, 0);
    made.markdown = source;
    if (before) before.replaceWith(made);
    else container.append(made);
  });
  while (container.children.length > found.length) container.lastChild.remove();
}

/** A text's blocks, each with the lines that it was made of. */
function blocks(lines) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const kind = kindAt(lines, at);
    const end = ENDS[kind](lines, at);
    found.push({ kind, lines: lines.slice(at, end) });
    at = end;
  }
  return found;
}

function kindAt(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  const divided = line.includes("|") && DIVIDER.test(lines[at + 1] ?? "");
  return divided && cells(line).length === cells(lines[at + 1]).length ? "table" : "paragraph";
}

// Where a block of each kind ends: the line behind it.
const ENDS = {
  code: (lines, at) => {
    const mark = lines[at].match(FENCE)[1];
    const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*$`);
    const end = lines.findIndex((line, i) => i > at && closing.test(line));
    return end < 0 ? lines.length : end + 1;
  },
  heading: (_, at) => at + 1,
  rule: (_, at) => at + 1,
  quote: (lines, at) => firstFrom(lines, at, (line) => !QUOTE.test(line)),
  table: (lines, at) => firstFrom(lines, at, (line) => !line.includes("|")),
  paragraph: (lines, at) =>
    firstFrom(lines, at + 1, (line, i) => !line.trim() || kindAt(lines, i) !== "paragraph"),
  list: (lines, at) => {
    const [, indent, mark] = lines[at].match(ITEM);
    const inside = indent.length + 1;
    return firstFrom(lines, at + 1, (line, i) => {
      if (!line.trim()) return !continues(lines[i + 1] ?? "", inside, indent.length, mark);
      if (depth(line) >= inside) return false;
      const item = line.match(ITEM);
      if (item) return !continues(line, inside, indent.length, mark);
      return !lines[i - 1].trim() || kindAt(lines, i) !== "paragraph";
    });
  },
};

function firstFrom(lines, start, ends) {
  for (let at = start; at < lines.length; at++) if (ends(lines[at], at)) return at;
  return lines.length;
}

const depth = (line) => line.length - line.trimStart().length;

/** Whether a line goes on with a list: deeper than its marks, or with another item of its kind. */
function continues(line, inside, indent, mark) {
  if (!line.trim()) return false;
  if (depth(line) >= inside) return true;
  const item = line.match(ITEM);
  return item !== null && item[1].length >= indent && kindOf(item[2]) === kindOf(mark);
}

const kindOf = (mark) => (/\d/.test(mark) ? mark.slice(-1) : mark);

function rendered({ kind, lines }, level) {
  if (level >= DEEPEST) return element("p", {}, ...inline(lines.join("\n")));
  return RENDER[kind](lines, level);
}

const children = (lines, level) => blocks(lines).map((block) => rendered(block, level));

const RENDER = {
  code: (lines) => {
    const [, mark, language] = lines[0].match(FENCE);
    const closed = lines.length > 1 && lines.at(-1).trim().startsWith(mark);
    const text = lines.slice(1, closed ? -1 : undefined).join("\n");
    return codeBlock(text, language);
  },
  heading: (lines) => {
    const [, marks, text] = lines[0].match(HEADING);
    return element(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(text));
  },
  rule: () => element("hr"),
  quote: (lines, level) =>
    element("blockquote", {}, ...children(lines.map((one) => one.replace(QUOTE, "")), level + 1)),
  table: (lines) => {
    const sides = cells(lines[1]).map(side);
    const row = (line, tag) =>
      element("tr", {}, ...sides.map((one, at) =>
        element(tag, one ? { class: one } : {}, ...inline(cells(line)[at] ?? ""))));
    const table = element("table", {},
      element("thead", {}, row(lines[0], "th")),
      element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td"))));
    return element("div", { class: "scroll" }, table);
  },
  paragraph: (lines) => element("p", {}, ...inline(lines.map((one) => one.trim()).join("\n"))),
  list: (lines, level) => {
    const [, indent, mark] = lines[0].match(ITEM);
    const items = [];
    for (const line of lines) {
      const item = line.match(ITEM);
      if (item && item[1].length <= indent.length) {
        items.push({ inside: item[1].length + item[2].length + 1, lines: [item[3]] });
      } else {
        const { inside, lines: own } = items.at(-1);
        own.push(line.slice(Math.min(inside, depth(line))));
      }
    }
    const first = parseInt(mark, 10);
    const attributes = first >= 0 && first !== 1 ? { start: first } : {};
    const made = items.map((item) => element("li", {}, ...itemContent(item.lines, level + 1)));
    return element(/\d/.test(mark) ? "ol" : "ul", attributes, ...made);
  },
};

/** What an item has: text without a paragraph around it where it is the first. */
function itemContent(lines, level) {
  const [first, ...others] = children(lines, level);
  if (first?.tagName !== "P") return first ? [first, ...others] : [];
  return [...first.childNodes, ...others];
}

/** A block of code with a button that copies it. */
export function codeBlock(text, language = "") {
  const bar = element("div", { class: "bar" }, language, copyButton("Copy the code", () => text));
  const code = element("code", {}, text);
  return element("div", { class: "code" }, bar, element("pre", { tabindex: "0" }, code));
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((one) => one.trim().replaceAll("\\|", "|"));
}

function side(mark) {
  if (!mark.endsWith(":")) return "";
  return mark.startsWith(":") ? "center" : "right";
}

// The alternatives of what may stand within a line. Lengths are bounded, so that no text takes long.
const INLINE = new RegExp(
  [
    /(?<ticks>`+)(?<code>[^]{1,2000}?)(?<!`)\k<ticks>(?!`)/,
    /\\(?<escaped>[*_`#|~>[\]])/,
    /!?\[(?<label>[^[\]\n]{0,500})\]\((?<target>[^\s()<>]{1,2000})(?:[ \t]+"[^"\n]{0,200}")?\)/,
    /<(?<auto>https?:\/\/[^\s<>]{1,2000}|mailto:[^\s<>]{1,300})>/,
    /(?<![\w/])(?<bare>https?:\/\/[^\s<>"`*]{0,2000}[^\s<>"`*.,;:!?'\])}])/,
    /(?<both>\*{3})(?=\S)(?<bold_italic>[^]{1,1000}?)(?<=\S)\*{3}/,
    /(?<strong>\*\*|(?<!\w)__)(?=\S)(?<bold>[^]{1,1000}?)(?<=\S)\k<strong>(?!\*)/,
    /(?<em>(?<!\w)[*_])(?=[^\s*_])(?<italic>[^]{0,1000}?[^\s*_])\k<em>(?!\w|\*)/,
    /~~(?=\S)(?<struck>[^]{1,1000}?)(?<=\S)~~/,
    /(?<newline>\n)/,
  ].map((one) => one.source).join("|"),
  "g",
);

/** The nodes of a text within a block. */
function inline(text, level = 0) {
  if (level >= DEEPEST) return [text];
  const nodes = [];
  let before = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > before) nodes.push(text.slice(before, found.index));
    nodes.push(inlineNode(found.groups, found[0], level + 1));
    before = found.index + found[0].length;
  }
  if (before < text.length) nodes.push(text.slice(before));
  return nodes;
}

function inlineNode(found, source, level) {
  const within = (tag, text) => element(tag, {}, ...inline(text, level));
  if (found.code !== undefined) return element("code", {}, trimmedCode(found.code));
  if (found.escaped) return found.escaped;
  if (found.target) return link(found.target, found.label || found.target, source, level);
  if (found.auto ?? found.bare) return link(found.auto ?? found.bare, null, source, level);
  if (found.bold_italic) return element("strong", {}, within("em", found.bold_italic));
  if (found.bold) return within("strong", found.bold);
  if (found.italic) return within("em", found.italic);
  if (found.struck) return within("del", found.struck);
  return element("br");
}

/** Code without the blank at either end that is there to set it apart from backticks. */
function trimmedCode(text) {
  return /^ .*\S.* $/s.test(text) ? text.slice(1, -1) : text;
}

/** A link; the source itself where it would lead to anything but a page or a mailbox. */
function link(target, label, source, level) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(target) || !URL.canParse(target)) return source;
  const attributes = { href: target, target: "_blank", rel: "noopener noreferrer nofollow" };
  const text = label === null ? [target.replace(/^mailto:/, "")] : inline(label, level);
  return element("a", attributes, ...text);
}
