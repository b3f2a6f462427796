// A histogram of latencies, and its quantiles in words.

import { byId, make, setText } from "./element.js";

// Upper bound of the bucket that the quantile falls into, seconds; null beyond the last bound.
function quantile(buckets, total, share) {
  let seen = 0;
  for (const [bound, count] of buckets) {
    seen += count;
    if (seen >= share * total) return bound;
  }
  return null;
}

const within = (bound, last) => {
  if (bound === null) return `above ${last} s`;
  return bound < 1 ? `≤ ${+(bound * 1000).toPrecision(3)} ms` : `≤ ${bound} s`;
};

export function showChart(name, buckets) {
  const chart = byId(name);
  const total = buckets.reduce((sum, [, count]) => sum + count, 0);
  const most = Math.max(1, ...buckets.map(([, count]) => count));
  if (chart.childElementCount !== buckets.length) chart.replaceChildren(...buckets.map(() => make("span")));
  buckets.forEach(([, count], i) => {
    const scale = `scaleY(${(count / most).toFixed(3)})`;
    const bar = chart.children[i];
    if (bar.style.transform !== scale) bar.style.transform = scale;
  });
  if (total === 0) return setText(byId(`${name}-text`), "none yet");
  const last = buckets.at(-2)[0];
  const [half, most95, most99] = [0.5, 0.95, 0.99].map(share => within(quantile(buckets, total, share), last));
  setText(byId(`${name}-text`), `half ${half}, 95 % ${most95}, 99 % ${most99}, of ${total}`);
}
