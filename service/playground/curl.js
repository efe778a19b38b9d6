// What was just done, as a command to copy, and how long it took.

import { key } from "./key.js";

/** The curl command of a POST with these pictures and options, safe to paste into a shell. */
export function curl(path, pictures, options) {
  const parts = ["curl"];
  if (key()) parts.push(`-H "Authorization: Bearer $PRG_API_KEY"`);
  for (const { name } of pictures) parts.push(`-F ${shell(`files=@${fileName(name)}`)}`);
  for (const [option, value] of Object.entries(options))
    for (const one of [value].flat()) if (one !== undefined) parts.push(`-F ${shell(`${option}=${one}`)}`);
  parts.push(shell(new URL(path, document.baseURI).href));
  return parts.join(" ");
}

// curl takes , and ; in a file's name for its own syntax unless the name is in double quotes.
const fileName = (name) => (/[",;\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name);
const shell = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

/** Show the command and the time in a card's last line. */
export function showDone(place, path, ms, command) {
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  const time = document.createElement("span");
  const code = document.createElement("code");
  const copy = document.createElement("button");
  summary.append("curl");
  time.className = "time";
  time.textContent = `POST ${path} answered in ${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
  code.textContent = command;
  code.tabIndex = 0;
  copy.type = "button";
  copy.textContent = "Copy";
  copy.addEventListener("click", async () => {
    copy.textContent = (await toClipboard(command, code)) ? "Copied" : "Press Ctrl+C";
    setTimeout(() => (copy.textContent = "Copy"), 2000);
  });
  details.open = place.querySelector("details")?.open ?? false;
  const box = document.createElement("div");
  box.className = "command";
  box.append(code, copy);
  details.append(summary, box);
  place.replaceChildren(time, details);
}

/** Over plain HTTP on another machine there is no clipboard: the text is selected instead. */
async function toClipboard(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return false;
  }
}
