// Reads the gateway's state twice a second while the page is seen, and shows it with the next frame.

import { ask, problemOf } from "./access.js";
import { showChart } from "./chart.js";
import "./chat.js";
import { byId, setText } from "./element.js";
import { showModels } from "./models.js";
import { followedNumber, showRequests } from "./requests.js";
import { showTimeline } from "./timeline.js";
import { showWorkers } from "./workers.js";

const INTERVAL_MS = 500;
const status = byId("status");
let updates = 0;
let connected = false;

function show(state) {
  setText(byId("cluster"), `${state.cluster}, ${state.gateway}`);
  const model = showModels(state.models);
  const news = showWorkers(state.workers);
  showRequests(state);
  showTimeline(state.timeline);
  showChart("ttft", model.ttft);
  showChart("itl", model.itl);
  if (news) setText(status, news);
  else if (!connected) setText(status, `Live: ${state.workers.length} workers`);
  connected = true;
  status.classList.remove("problem");
  byId("main").dataset.updates = ++updates;
}

function fail(message) {
  connected = false;
  status.classList.add("problem");
  setText(status, message);
}

async function read() {
  const followed = followedNumber();
  const response = await ask("console/state" + (followed === null ? "" : `?request=${followed}`));
  if (!response.ok) return fail(await problemOf(response));
  const state = await response.json();
  await new Promise(requestAnimationFrame);
  show(state);
}

const pause = () => new Promise(resolve => setTimeout(resolve, INTERVAL_MS));
const seen = () => document.hidden
  ? new Promise(resolve => document.addEventListener("visibilitychange", resolve, { once: true }))
  : undefined;

for (;;) {
  await seen();
  try {
    await read();
  } catch (error) {
    fail(`The gateway does not answer (${error.message}).`);
  }
  await pause();
}
