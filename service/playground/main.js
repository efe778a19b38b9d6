// The page: which model, which pictures, and the panels that show them.

import { call } from "./api.js";
import { Classes } from "./classes.js";
import { forget, key } from "./key.js";
import { sceneButtons, Slot, takeDropsAndPastes } from "./pictures.js";
import { Similarity } from "./similarity.js";
import { Trajectory } from "./trajectory.js";

const $ = (id) => document.getElementById(id);
const classes = new Classes();
const trajectory = new Trajectory();
const similarity = new Similarity();
const panels = [classes, trajectory, similarity];

const picture = new Slot($("picture"), (chosen) => {
  picture.show(chosen);
  first.show(chosen);
  for (const panel of panels) panel.show(chosen);
});
const first = new Slot($("first"), picture.chosen);
const second = new Slot($("second"), (chosen) => {
  second.show(chosen);
  similarity.show(undefined, chosen);
});
takeDropsAndPastes([picture, first, second]);
sceneButtons($("scenes"), "Try", picture.chosen);
sceneButtons($("others"), "Compare with", second.chosen);

let models = [];
$("model").addEventListener("change", () => use(models.find(({ name }) => name === $("model").value)));
$("forget-key").addEventListener("click", () => {
  forget();
  location.reload();
});
start();

async function start() {
  banner("");
  try {
    const { body } = await call("models");
    $("forget-key").hidden = !key();
    models = body.data.filter(({ state }) => state === "ready");
    const failed = body.data.filter(({ state }) => state !== "ready");
    const options = models.map(({ name }) => new Option(name));
    options.push(...failed.map(({ name }) => Object.assign(new Option(`${name} (failed)`), { disabled: true })));
    $("model").replaceChildren(...options);
    $("model-picker").hidden = options.length < 2;
    const chosen = models.find(({ name }) => name === body.default) ?? models[0];
    if (chosen) {
      $("model").value = chosen.name;
      use(chosen);
    } else {
      banner(failed.length ? `No model is ready: ${failed.map((m) => `${m.name}: ${m.reason}`).join("; ")}.` : "No model is served yet.");
    }
  } catch (error) {
    banner(error.message);
  }
}

function use(model) {
  for (const panel of panels) {
    panel.use(model);
    panel.show();
  }
}

function banner(text) {
  $("banner").hidden = !text;
  $("banner").replaceChildren(text);
  if (!text) return;
  const again = document.createElement("button");
  again.type = "button";
  again.textContent = "Try again";
  again.addEventListener("click", start);
  $("banner").append(" ", again);
}
