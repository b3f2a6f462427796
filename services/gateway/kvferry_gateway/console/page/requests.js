// Requests on their way through the cluster, and those that ended lately.

import { byId, make, Rows, setText } from "./element.js";

const PHASES = { queued: "queued", prefill: "prefill", kv: "KV on its way", decode: "decode" };
const numbers = new Intl.NumberFormat("en");
const counts = new Map([...document.querySelectorAll("#flow dd")].map(node => [node.dataset.phase, node]));

let followed = null; // number of the request whose timeline is shown
let awaited = null; // request id that is followed as soon as it is seen

export const followedNumber = () => followed;
export const follow = requestId => { awaited = requestId; };

function create(row) {
  const button = make("button", { type: "button", textContent: row.request_id + (row.choice ? ` #${row.choice}` : "") });
  button.addEventListener("click", () => { followed = row.number; });
  const cells = Array.from({ length: 6 }, () => make("td", { role: "cell" }));
  const node = make("tr", { role: "row" }, make("th", { role: "rowheader", scope: "row" }, button), ...cells);
  return { node, button, cells, texts: [] };
}

// How far it is in its phase, as its worker's last heartbeat had it.
function phase(row) {
  if (row.progress === null) return PHASES[row.phase] ?? row.phase;
  const [done, total] = row.progress;
  if (row.phase === "kv") return `KV ${Math.floor(100 * done / total)} %`;
  return `${PHASES[row.phase]} ${numbers.format(done)} of ${numbers.format(total)}`;
}

function update({ node, button, cells, texts }, row) {
  const pressed = String(row.number === followed);
  if (button.ariaPressed !== pressed) button.ariaPressed = pressed;
  const over = !(row.phase in PHASES);
  if (node.classList.contains("over") !== over) node.classList.toggle("over", over);
  const again = row.attempts > 1 ? `, attempt ${row.attempts}` : "";
  const told = [
    row.model,
    phase(row) + again,
    row.decode === null ? "" : row.prefill === null ? row.decode : `${row.prefill} → ${row.decode}`,
    row.prompt_tokens,
    row.tokens,
    over ? row.seconds.toFixed(2) : row.seconds.toFixed(0),
  ];
  for (let at = 0; at < told.length; at++) if (texts[at] !== told[at]) setText(cells[at], texts[at] = told[at]);
}

const rows = new Rows(byId("requests"), row => row.number, create, update);

export function showRequests(state) {
  const all = [...state.requests, ...state.ended];
  const mine = awaited === null ? undefined : all.find(row => row.request_id === awaited);
  if (mine !== undefined) [followed, awaited] = [mine.number, null];
  const found = { queued: 0, prefill: 0, kv: 0, decode: 0 };
  for (const row of state.requests) found[row.phase] += 1;
  for (const [phase, node] of counts) setText(node, found[phase]);
  const shown = state.requests.length;
  const part = shown < state.num_requests ? `, the oldest ${shown} shown` : "";
  setText(byId("flow-title"), `Under way: ${state.num_requests}${part}`);
  rows.show(all);
}
