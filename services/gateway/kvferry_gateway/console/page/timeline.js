// One request's life: what happened, when, and why it was placed where it was.

import { byId, make, Rows, setText } from "./element.js";

const WHY = {
  cached_prefix: "more of its prompt is cached there",
  least_work: "least work in front of it",
  short_prompt: "a short prompt is computed where it is decoded",
  faster_on_decode: "faster without a hand-off",
  no_prefill_worker: "no prefill worker may serve that decode worker",
};
const ms = seconds => (seconds === null ? "?" : `${(seconds * 1000).toFixed(1)} ms`);

function told(event) {
  switch (event.what) {
    case "arrived":
      return `arrived with ${event.prompt_tokens} tokens`;
    case "placed":
      return `attempt ${event.attempt} offered to ${event.prefill === null ? "" : `${event.prefill} and `}${event.decode}: ` +
        `${WHY[event.why] ?? event.why}; ${event.cached_tokens} tokens cached, expected: queue ${ms(event.queue_s)}, ` +
        `prefill ${ms(event.prefill_s)}, transfer ${ms(event.transfer_s)}, first token ${ms(event.ttft_s)}, ` +
        `then ${ms(event.itl_s)} a token; ${event.num_considered} choices compared`;
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
  const time = make("time", { textContent: `+${event.at_s.toFixed(3)} s` });
  return { node: make("li", {}, time, make("span", { textContent: told(event) })) };
}

const rows = new Rows(byId("timeline"), event => `${event.number} ${event.at_s} ${event.what}`, create, () => {});

export function showTimeline(timeline) {
  byId("timeline-hint").hidden = timeline !== null;
  setText(byId("followed"), timeline === null ? "a request" : timeline.request_id);
  rows.show((timeline?.events ?? []).map(event => ({ ...event, number: timeline.number })));
}
