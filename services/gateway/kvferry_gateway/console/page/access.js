// The key that the reader gave, for as long as this tab is open, and requests that carry it.

import { byId } from "./element.js";

const NAME = "kvferry-key";

export const hasKey = () => sessionStorage.getItem(NAME) !== null;

export function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(NAME);
  if (key !== null) headers.set("authorization", `Bearer ${key}`);
  return fetch(path, { ...options, headers });
}

// What a response that is no success says.
export async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP ${response.status}`;
  }
}

byId("access").addEventListener("submit", event => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (key) sessionStorage.setItem(NAME, key);
  else sessionStorage.removeItem(NAME);
  byId("key").value = "";
});
