// The workers: their state, their load, a map of their block pool, and the button that drains one.

import { ask, hasKey, problemOf } from "./access.js";
import { byId, make, Rows, setText } from "./element.js";
import { PoolMap } from "./pool.js";

let known = null; // name -> state, as last announced
let chosen = null; // the worker that the dialog is about

function create(row) {
  const state = make("span");
  const load = make("span", { className: "load" });
  const pool = new PoolMap();
  const button = make("button", { type: "button", textContent: "Drain" });
  button.setAttribute("aria-label", `Drain ${row.name}`);
  button.addEventListener("click", () => {
    chosen = row;
    setText(byId("draining-name"), row.name);
    byId("draining").showModal();
  });
  const title = make("div", {}, make("strong", { textContent: row.name }), " ", state, make("br"), load);
  return { node: make("li", {}, title, button, pool.canvas, pool.text), state, load, pool, button };
}

function update(parts, row) {
  setText(parts.state, row.unserved === null ? row.state : `${row.state}, but gets no request: ${row.unserved}`);
  parts.state.className = row.state === "ready" && row.unserved === null ? "load" : "not-ready";
  const rate = row.role === "prefill"
    ? `${Math.round(row.load.prefill_tokens_per_s)} tokens/s`
    : `step ${(row.load.decode_step_s * 1000).toFixed(1)} ms`;
  setText(parts.load, `${row.model}: ${row.load.num_running} running, ${row.load.num_waiting} waiting, ${rate}`);
  parts.pool.show(row.load.blocks, row.load.free_blocks, row.num_blocks);
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
