// The workers: their state, their load, how much of their block pool is held, and the button that drains one.

import { ask, hasKey, problemOf } from "./access.js";
import { byId, make, Rows, setText } from "./element.js";

let known = null; // name -> state, as last announced
let chosen = null; // the worker that the dialog is about

function create(row) {
  const state = make("span");
  const load = make("span", { className: "load" });
  const used = make("span");
  const blocks = make("div", { className: "blocks", role: "img" }, used);
  const button = make("button", { type: "button", textContent: "Drain" });
  button.setAttribute("aria-label", `Drain ${row.name}`);
  button.addEventListener("click", () => {
    chosen = row;
    setText(byId("draining-name"), row.name);
    byId("draining").showModal();
  });
  const title = make("div", {}, make("strong", { textContent: row.name }), " ", state, make("br"), load);
  return { node: make("li", {}, title, button, blocks), state, load, used, blocks, button, label: "" };
}

function update(parts, row) {
  const held = row.num_blocks - row.load.free_blocks;
  const share = row.num_blocks ? Math.min(1, Math.max(0, held / row.num_blocks)) : 0;
  setText(parts.state, row.unserved === null ? row.state : `${row.state}, but gets no request: ${row.unserved}`);
  parts.state.className = row.state === "ready" && row.unserved === null ? "load" : "not-ready";
  const rate = row.role === "prefill"
    ? `${Math.round(row.load.prefill_tokens_per_s)} tokens/s`
    : `step ${(row.load.decode_step_s * 1000).toFixed(1)} ms`;
  setText(parts.load, `${row.model}: ${row.load.num_running} running, ${row.load.num_waiting} waiting, ${rate}`);
  const label = `${held} of ${row.num_blocks} blocks held, the others free or evictable`;
  if (label !== parts.label) {
    parts.label = label;
    parts.blocks.ariaLabel = parts.blocks.title = label;
    parts.used.style.transform = `scaleX(${share.toFixed(4)})`;
  }
  parts.button.disabled = !hasKey() || row.state === "draining";
  parts.button.title = hasKey() ? "" : "Draining takes a key";
}

const rows = new Rows(byId("workers"), row => row.incarnation, create, update);

// Returns what is new, for the status line; "" for nothing.
export function showWorkers(workers) {
  rows.show(workers);
  const now = new Map(workers.map(row => [row.name, row.state]));
  const news = [];
  if (known !== null) {
    for (const [name, state] of now) if (known.get(name) !== state) news.push(`${name} is ${state}`);
    for (const name of known.keys()) if (!now.has(name)) news.push(`${name} is gone`);
  }
  known = now;
  return news.join(", ");
}

byId("draining").addEventListener("close", () => {
  if (!rows.shown.has(chosen.incarnation)) byId("workers").focus(); // the button is gone with its worker
});
byId("drain-no").addEventListener("click", () => byId("draining").close());
byId("drain-yes").addEventListener("click", async () => {
  byId("draining").close();
  const response = await ask("console/drain", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ incarnation: chosen.incarnation }),
  });
  setText(byId("status"), response.ok ? `${chosen.name} was asked to drain` : await problemOf(response));
});
