// A conversation with the chosen model, streamed. Text is appended once per frame, however many tokens came.

import { ask, problemOf } from "./access.js";
import { byId, make } from "./element.js";
import { chosenModel } from "./models.js";
import { follow } from "./requests.js";

const messages = [];
const log = byId("conversation");
let running = null; // AbortController of the answer under way

function say(className, text) {
  const node = make("p", { className, textContent: text });
  log.append(node);
  log.scrollTop = log.scrollHeight;
  return node;
}

// `write` collects text for the next frame, which writes it into `node`; `flush` waits for none.
function writer(node) {
  let waiting = "";
  const flush = () => {
    node.append(waiting);
    waiting = "";
    log.scrollTop = log.scrollHeight;
  };
  const write = text => {
    if (waiting === "") requestAnimationFrame(flush);
    waiting += text;
  };
  return { write, flush };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (buffered + value).split("\n\n");
    buffered = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

async function answer(signal) {
  const id = `console-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
  follow(id);
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", "x-request-id": id },
    body: JSON.stringify({ model: chosenModel(), messages, stream: true }),
    signal,
  });
  if (!response.ok) throw new Error(await problemOf(response));
  const { write, flush } = writer(say("assistant", ""));
  let text = "";
  try {
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta;
      const piece = (delta?.reasoning_content ?? "") + (delta?.content ?? "");
      text += delta?.content ?? "";
      if (piece) write(piece);
    }
  } finally {
    flush();
    messages.push({ role: "assistant", content: text });
  }
}

// A button that can't be pressed for now would lose the focus: the message gets it.
function disable(button) {
  if (document.activeElement === button) byId("prompt").focus();
  button.disabled = true;
}

async function send() {
  const prompt = byId("prompt").value.trim();
  if (!prompt || running !== null) return;
  running = new AbortController();
  byId("prompt").value = "";
  disable(byId("send"));
  byId("stop").disabled = false;
  log.ariaBusy = "true"; // a screen reader reads the answer once it is whole
  messages.push({ role: "user", content: prompt });
  say("user", prompt);
  try {
    await answer(running.signal);
  } catch (error) {
    if (messages.at(-1).role === "user") messages.pop();
    say("problem", error.name === "AbortError" ? "Stopped." : error.message);
  }
  running = null;
  log.ariaBusy = "false";
  byId("send").disabled = false;
  disable(byId("stop"));
}

byId("chat").addEventListener("submit", event => {
  event.preventDefault();
  send();
});
byId("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
