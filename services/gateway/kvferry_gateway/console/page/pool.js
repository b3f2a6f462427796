// A worker's pool of KV blocks as a map: a cell for each block, or for some blocks of a large pool, by state.

import { byId, make, setText } from "./element.js";

const NAMES = {
  running: "running", held: "held for a hand-off", fetching: "KV on its way", reserved: "reserved",
  cached: "cached", free: "free",
};
const MAX_CELLS = 512;
const CELL = 8; // pixels, the gap to the next one among them
const key = make("ul", { id: "pool-key", ariaLabel: "States of blocks" });

// Rows of [state, number of blocks], in the order of the map; the states of a newer worker come first.
function ordered(blocks) {
  const known = Object.keys(NAMES);
  return [...Object.keys(blocks).filter(state => !(state in NAMES)), ...known]
    .map(state => [state, blocks[state] ?? 0])
    .filter(([, count]) => count > 0);
}

// [state, first cell, cell after its last]. A state that has blocks has a cell, as long as there are any left.
export function layout(rows, total) {
  const numCells = Math.min(total, MAX_CELLS);
  let seen = 0;
  let first = 0;
  return rows.map(([state, count], place) => {
    seen += count;
    const left = rows.length - place - 1;
    const wanted = Math.round(seen * numCells / total);
    const end = Math.max(first, Math.min(numCells - left, Math.max(first + 1, wanted)));
    const run = [state, first, end];
    first = end;
    return run;
  });
}

// The key below the workers: what the colours mean, and where a map takes them from.
const swatches = new Map();
for (const [state, name] of Object.entries(NAMES)) {
  const swatch = make("span", { ariaHidden: "true" });
  swatch.dataset.state = state;
  swatches.set(state, swatch);
  key.append(make("li", {}, swatch, name));
}
byId("workers").after(key);

const colours = new Map(); // state -> as the key shows it now
function colourOf(state) {
  if (!colours.has(state)) colours.set(state, getComputedStyle(swatches.get(state) ?? swatches.get("reserved")).color);
  return colours.get(state);
}

function draw(canvas, rows, total) {
  const numCells = Math.min(total, MAX_CELLS);
  const columns = Math.max(1, Math.ceil(Math.sqrt(numCells * 8)));
  const numRows = Math.ceil(numCells / columns);
  const [width, height] = [columns * CELL, numRows * CELL];
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, width, height);
  for (const [state, first, end] of layout(rows, total)) {
    pen.fillStyle = colourOf(state);
    for (let at = first; at < end;) { // row by row
      const stop = Math.min(end, at - at % columns + columns);
      pen.fillRect(at % columns * CELL, Math.floor(at / columns) * CELL, (stop - at) * CELL, CELL);
      at = stop;
    }
  }
  for (let column = 1; column <= columns; column++) pen.clearRect(column * CELL - 1, 0, 1, height);
  for (let row = 1; row <= numRows; row++) pen.clearRect(0, row * CELL - 1, width, 1);
}

let shade = 0; // changes with the colours
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  colours.clear();
  shade += 1;
});

export class PoolMap {
  constructor() {
    this.canvas = make("canvas", { className: "blocks", role: "img", width: 1, height: 1 });
    this.text = make("p", { className: "load counts", ariaHidden: "true" }); // a screen reader has it from the map
    this.drawn = "";
  }

  // `blocks`: counts by state, empty from a worker that tells only how many are free or evictable.
  show(blocks, numFree, total) {
    const counts = ordered(blocks);
    const news = `${shade} ${total} ${numFree} ${counts}`;
    if (news === this.drawn) return;
    this.drawn = news;
    const held = total - numFree;
    const rest = counts.length
      ? `: ${counts.map(([state, count]) => `${count} ${NAMES[state] ?? state}`).join(", ")}`
      : ", the others free or evictable";
    const label = `${held} of ${total} blocks held${rest}`;
    this.canvas.ariaLabel = this.canvas.title = label;
    setText(this.text, label);
    draw(this.canvas, counts.length ? counts : ordered({ running: held, free: numFree }), total);
  }
}
