// SPDX-License-Identifier: Apache-2.0
// The head layout as a picture: a box for each device, in it a row for each key/value head, with
// the query heads that attend to it. Heads of one group have one colour, wherever they lie.

import { by, shape } from "./dom.js";

const CELL = 22; // pixels
const GAP = 3;
const TITLE = 18;
const COLOURS = 8;
let drawn = "";

/** Draws the layout, where it is another than the last. */
export function drawMesh(mesh) {
  const now = JSON.stringify(mesh);
  if (now === drawn) return;
  drawn = now;
  by("mesh").replaceChildren(...(mesh ? mesh.query_heads.map((_, at) => device(mesh, at)) : []));
  by("mesh-said").textContent = mesh ? said(mesh) : "The server does not say.";
}

function said(mesh) {
  const one = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  const devices = one(mesh.query_heads.length, "device");
  const heads = `${one(mesh.model_query_heads, "query head")} and ` +
    one(mesh.model_key_value_heads, "key/value head");
  const padding = mesh.query_heads.flat(2).filter((head) => head === null).length;
  return `${heads} on ${devices}: a row is a key/value head (filled) and its query heads.` +
    (padding ? ` ${one(padding, "query head")} of the mesh ${padding === 1 ? "is" : "are"} padding (dashed).` : "") +
    (mesh.copies > 1 ? ` ${mesh.copies} such copies of the model share the batch.` : "");
}

function device(mesh, at) {
  const rows = mesh.query_heads[at];
  const keys = mesh.key_value_heads[at];
  const step = CELL + GAP;
  const width = Math.max(64, (1 + rows[0].length) * step + 3 * GAP);
  const height = TITLE + rows.length * step + 2 * GAP;
  const parts = [
    shape("title", {}, name(keys, rows, at)),
    shape("rect", { class: "device", x: 0.5, y: 0.5, width: width - 1, height: height - 1, rx: 5 }),
    shape("text", { class: "title", x: 2 * GAP, y: TITLE / 2 + 2 }, `device ${at}`),
  ];
  rows.forEach((queries, row) => {
    const y = TITLE + GAP + row * step;
    const group = keys[row] === null ? "" : `k${keys[row] % COLOURS}`;
    parts.push(...head("kv", keys[row], group, 2 * GAP, y));
    queries.forEach((query, column) =>
      parts.push(...head("query", query, group, 3 * GAP + (1 + column) * step, y)));
  });
  const size = { width, height, viewBox: `0 0 ${width} ${height}` };
  return shape("svg", { ...size, role: "img", "aria-label": name(keys, rows, at) }, ...parts);
}

/** A head's cell; null is padding. */
function head(kind, number, group, x, y) {
  const cell = { x, y, width: CELL, height: CELL, rx: 3 };
  if (number === null) return [shape("rect", { ...cell, class: "padding" })];
  return [
    shape("rect", { ...cell, class: `${kind} ${group}` }),
    shape("text", { class: kind, x: x + CELL / 2, y: y + CELL / 2 + 0.5 }, String(number)),
  ];
}

function name(keys, rows, at) {
  const list = (heads) => heads.filter((one) => one !== null).join(", ") || "none";
  return `device ${at}: key/value heads ${list(keys)}; query heads ${list(rows.flat())}`;
}
