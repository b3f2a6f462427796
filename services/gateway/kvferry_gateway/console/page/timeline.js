// One request's life: where its time went, what happened, when, and why it was placed where it was.

import { byId, make, Rows, setText } from "./element.js";

const WHY = {
  cached_prefix: "more of its prompt is cached there",
  least_work: "least work in front of it",
  short_prompt: "a short prompt is computed where it is decoded",
  faster_on_decode: "faster without a hand-off",
  no_prefill_worker: "no prefill worker may serve that decode worker",
};
const STAGES = {
  placement: "placing", queue: "queue", prefill: "prefill", messages: "messages", transfer: "KV transfer",
  "first step": "first step", decode: "decode", lost: "lost attempts",
};
const bar = make("div", { id: "stages-bar", ariaHidden: "true" });
const list = make("ul", { id: "stages", ariaLabel: "Where the time went" });
byId("timeline-hint").after(bar, list);

const time = seconds => {
  if (seconds === null) return "?";
  return seconds < 1 ? `${(seconds * 1000).toFixed(1)} ms` : `${seconds.toFixed(2)} s`;
};

function told(event) {
  switch (event.what) {
    case "arrived":
      return `arrived with ${event.prompt_tokens} tokens`;
    case "placed":
      return `attempt ${event.attempt} offered to ${event.prefill === null ? "" : `${event.prefill} and `}${event.decode}: ` +
        `${WHY[event.why] ?? event.why}; ${event.cached_tokens} tokens cached, expected: queue ${time(event.queue_s)}, ` +
        `prefill ${time(event.prefill_s)}, transfer ${time(event.transfer_s)}, first token ${time(event.ttft_s)}, ` +
        `then ${time(event.itl_s)} a token; ${event.num_considered} choices compared`;
    case "accepted":
      return `attempt ${event.attempt} accepted`;
    case "lost":
      return `attempt ${event.attempt} lost: ${event.reason}; the rest is placed again`;
    case "ended":
      return `ended after ${event.num_tokens} tokens: ${event.outcome}`;
    default:
      return event.what;
  }
}

function create(event) {
  const at = make("time", { textContent: `+${event.at_s.toFixed(3)} s` });
  return { node: make("li", {}, at, make("span", { textContent: told(event) })) };
}

// A stage in the bar and in the list; its share is of the whole time.
const part = tag => ({ stage }) => {
  const node = make(tag);
  node.dataset.stage = stage;
  return { node, shown: null };
};
const segments = new Rows(bar, row => row.stage, part("span"), (parts, row) => {
  if (parts.shown !== row.share) parts.node.style.flexGrow = parts.shown = row.share;
});
const entries = new Rows(list, row => row.stage, part("li"), ({ node }, row) => {
  setText(node, `${STAGES[row.stage]} ${time(row.seconds)}, ${(100 * row.share).toFixed(0)} %`);
});

function showStages(stages) {
  const total = stages.reduce((sum, [, seconds]) => sum + seconds, 0) || 1;
  const shares = stages.map(([stage, seconds]) => ({ stage, seconds, share: +(seconds / total).toFixed(4) }));
  segments.show(shares);
  entries.show(shares);
}

const rows = new Rows(byId("timeline"), event => `${event.number} ${event.at_s} ${event.what}`, create, () => {});

export function showTimeline(timeline) {
  byId("timeline-hint").hidden = timeline !== null;
  setText(byId("followed"), timeline === null ? "a request" : timeline.request_id);
  showStages(timeline?.stages ?? []);
  rows.show((timeline?.events ?? []).map(event => ({ ...event, number: timeline.number })));
}
