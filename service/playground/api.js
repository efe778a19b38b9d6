// Calls of the service, timed; its errors in words.

import { ask, key } from "./key.js";

/** An error that can be shown: what went wrong, and whether trying again may help. */
export class Trouble extends Error {
  constructor(message, { title = "", again = false } = {}) {
    super(message);
    this.title = title;
    this.again = again;
  }
}

/** {body, ms} of a call. Raises Trouble, or AbortError where `signal` ended it. */
export async function call(path, { form, signal, priority } = {}) {
  for (let tried = 0; ; tried++) {
    const used = key();
    const headers = used ? { Authorization: `Bearer ${used}` } : {};
    if (priority) headers.Priority = priority;
    const started = performance.now();
    let response, body;
    try {
      response = await fetch(path, { method: form ? "POST" : "GET", body: form, headers, signal });
      body = await response.json().catch(() => null);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The service can't be reached. Is it running?", { again: true });
    }
    const ms = performance.now() - started;
    signal?.throwIfAborted();
    if (response.ok && body) return { body, ms };
    if (response.status === 401) {
      // Another call may have got a key while this one was under way.
      const renewed = key() !== used || (await ask(used && tried ? "That key is not known here." : "Ask whoever runs it for one."));
      if (renewed) continue;
      throw new Trouble("Without a key this service answers nothing.", { again: true });
    }
    throw trouble(response, body);
  }
}

function trouble(response, body) {
  const wait = response.headers.get("retry-after");
  const detail = body?.detail ?? `The service answered ${response.status}.`;
  const later = wait ? ` Try again in ${wait} s.` : "";
  const again = response.status === 429 || response.status >= 500;
  return new Trouble(sentence(detail) + later, { title: body?.title ?? "", again });
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");

/** A form with these pictures ({blob, name}) and options; a list repeats its field. */
export function formOf(pictures, options) {
  const form = new FormData();
  for (const { blob, name } of pictures) form.append("files", blob, name);
  for (const [option, value] of Object.entries(options))
    for (const one of [value].flat()) if (one !== undefined) form.append(option, one);
  return form;
}
