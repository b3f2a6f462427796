// The models that the gateway serves, and the one that the reader has chosen: to chat with, and whose latencies are shown.

import { byId, setText } from "./element.js";

const select = byId("model");

export const chosenModel = () => select.value;

// Returns the chosen model's state.
export function showModels(models) {
  const names = models.map(model => model.name);
  if (names.join() !== Array.from(select.options, option => option.value).join()) {
    const before = select.value;
    select.replaceChildren(...names.map(name => new Option(name, name)));
    if (names.includes(before)) select.value = before;
  }
  for (const [at, model] of models.entries()) setText(select.options[at], model.ready ? model.name : `${model.name} (no worker)`);
  const chosen = models.find(model => model.name === select.value);
  setText(byId("latency-model"), chosen.name);
  return chosen;
}
