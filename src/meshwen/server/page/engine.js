// SPDX-License-Identifier: Apache-2.0
// What the engine is doing, asked for once a second while the page is seen.

import { by, element, shape } from "./dom.js";
import { drawMesh } from "./mesh.js";
import { request } from "./stream.js";

const PERIOD = 1000; // milliseconds
const KEPT = 60; // rates in the picture of the last minute
const rates = [];
let before = null;
let refused = null; // The key with which the server has refused to say anything.

/** Shows the engine's state, now and from now on. */
export async function watchEngine() {
  if (!document.hidden) await look();
  setTimeout(watchEngine, PERIOD);
}

async function look() {
  if (refused === by("key").value) return;
  refused = null;
  try {
    const state = await (await request("page/state")).json();
    by("stale").hidden = true;
    drawMesh(state.mesh);
    by("about").textContent = about(state);
    showNumbers(state, rateOf(state));
    before = state;
  } catch (error) {
    by("stale").hidden = false;
    by("stale").textContent = `No news of the engine: ${error.message}`;
    before = null;
    if (error.status === 401) refused = by("key").value;
  }
}

/** Tokens a second since the last look; null at the first. */
function rateOf(state) {
  if (state.generated_tokens === null || before === null) return null;
  const seconds = state.seconds - before.seconds;
  const tokens = state.generated_tokens - before.generated_tokens;
  if (seconds <= 0 || tokens < 0) return null; // It was started anew.
  rates.push(tokens / seconds);
  rates.splice(0, rates.length - KEPT);
  return tokens / seconds;
}

function about({ max_model_len: length, fingerprint, mesh }) {
  const parts = [];
  if (mesh) parts.push(`${mesh.numerics} numerics in ${mesh.weights}, mesh ${mesh.label}`);
  parts.push(`context of ${count(length)} tokens`, fingerprint);
  return parts.join("; ");
}

const count = (number) => number.toLocaleString("en");
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(0)}%` : "–");

function showNumbers(state, rate) {
  const { cache } = state;
  const tiles = [
    tile("Tokens a second", rate === null ? "–" : rate.toFixed(rate < 10 ? 1 : 0), null, picture()),
    tile("Running requests", count(state.running)),
    tile("Waiting requests", count(state.waiting), `at most ${count(state.max_queue)}`),
  ];
  if (cache) {
    const used = `${count(cache.used_blocks)} of ${count(cache.total_blocks)} blocks`;
    const meter = element("meter", {
      min: 0,
      max: cache.total_blocks || 1,
      value: cache.used_blocks,
      "aria-label": "KV cache in use",
    });
    const found = `${count(cache.cached_tokens)} of ${count(cache.queried_tokens)} prompt tokens`;
    tiles.push(
      tile("KV cache in use", percent(cache.used_blocks, cache.total_blocks), used, meter),
      tile("Prefix cache hits", percent(cache.cached_tokens, cache.queried_tokens), found),
    );
  }
  if (state.generated_tokens !== null) {
    tiles.push(tile("Tokens so far", count(state.generated_tokens)));
  }
  by("numbers").replaceChildren(...tiles);
}

function tile(name, value, more = null, extra = null) {
  const parts = [element("dt", {}, name), element("dd", {}, value)];
  if (more) parts.push(element("dd", { class: "more" }, more));
  if (extra) parts.push(element("dd", { class: "more" }, extra));
  return element("div", {}, ...parts);
}

/** The rates of the last minute as a line. */
function picture() {
  const top = Math.max(1, ...rates);
  const points = rates.map((rate, at) =>
    `${((KEPT - rates.length + at) * 100) / (KEPT - 1)},${(19 - (18 * rate) / top).toFixed(2)}`);
  return shape("svg", {
    viewBox: "0 0 100 20", preserveAspectRatio: "none", role: "img",
    "aria-label": `Tokens a second in the last minute, at most ${Math.round(Math.max(0, ...rates))}`,
  }, shape("polyline", { points: points.join(" ") }));
}
