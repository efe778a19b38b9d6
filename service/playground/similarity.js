// How alike two pictures are, level by level.

import { call, formOf } from "./api.js";
import { curl, showDone } from "./curl.js";
import { Panel } from "./panel.js";
import { ownPicture } from "./pictures.js";
import { LEVELS } from "./trajectory.js";

const $ = (id) => document.getElementById(id);
const SAMPLES = 32;
const AT_ONCE = 8;

export class Similarity extends Panel {
  constructor() {
    super($("similarity"));
    this.means = new Map();
    this.columns = this.element.querySelector(".columns");
    this.number = this.element.querySelector(".number");
    this.what = this.element.querySelector(".what");
    $("feature").addEventListener("change", () => this.show());
  }

  use(model) {
    this.model = model;
    this.stop();
    this.clear();
    $("feature").value = model.feature;
    /** The model's own level is always among them. */
    this.levels = LEVELS.includes(model.t_end)
      ? LEVELS
      : [...LEVELS.filter((level) => level !== 0.55), model.t_end].sort((a, b) => b - a);
  }

  clear() {
    this.columns.hidden = true;
    this.number.textContent = "";
    this.what.textContent = this.first && this.second ? "" : "Choose two pictures to compare.";
    this.done.replaceChildren();
  }

  show(first = this.first, second = this.second) {
    Object.assign(this, { first, second });
    if (!first || !second || !this.model) return;
    const feature = $("feature").value;
    const options = { model: this.model.name, feature, t_end: this.levels };
    this.run(async (signal) => {
      const { body, ms } = await call("embed", { form: formOf([first, second], options), signal });
      const bad = body.data.find((item) => item.error);
      if (bad) throw Object.assign(new Error(`Picture ${bad.index + 1}: ${bad.error.detail}.`), { again: false });
      this.what.textContent = "looking at the built-in pictures …";
      const mean = await this.meanOf(feature, body.fingerprint, signal);
      const [a, b] = body.data.map((item) => item.embeddings.map(({ embedding }) => embedding));
      const cosines = this.levels.map((_, i) => cosine(minus(a[i], mean[i]), minus(b[i], mean[i])));
      this.columns.replaceChildren(...cosines.map((value, i) => this.column(value, this.levels[i])));
      this.columns.hidden = false;
      this.number.textContent = shown(cosines[this.levels.indexOf(this.model.t_end)]);
      this.what.textContent = `${feature} at t_end ${this.model.t_end}`;
      showDone(this.done, "/embed", ms, curl("embed", [first, second], options));
    }).then(() => {
      if (this.element.classList.contains("failed")) this.clear();
    });
  }

  /** The mean feature of the page's own pictures at each level; computed once for these weights. */
  async meanOf(feature, fingerprint, signal) {
    const known = [this.model.name, fingerprint, feature, this.levels].join(" ");
    if (!this.means.has(known)) {
      const names = Array.from({ length: SAMPLES }, (_, i) => `samples/${String(i).padStart(2, "0")}.png`);
      const sums = this.levels.map(() => null);
      const pictures = await Promise.all(names.map(ownPicture));
      while (pictures.length) {
        const options = { model: this.model.name, feature, t_end: this.levels, encoding_format: "base64" };
        const form = formOf(pictures.splice(0, AT_ONCE), options);
        const { body } = await call("embed", { form, signal, priority: "bulk" });
        for (const item of body.data)
          item.embeddings.forEach(({ embedding }, i) => {
            const vector = floats(embedding);
            sums[i] = sums[i] ? sums[i].map((x, k) => x + vector[k]) : [...vector];
          });
      }
      this.means.set(known, sums.map((sum) => sum.map((x) => x / SAMPLES)));
    }
    return this.means.get(known);
  }

  column(value, level) {
    const item = document.createElement("li");
    const number = document.createElement("span");
    const track = document.createElement("span");
    const fill = document.createElement("span");
    const label = document.createElement("span");
    item.classList.toggle("own", level === this.model.t_end);
    item.setAttribute("aria-label", `t_end ${level}: cosine ${shown(value)}`);
    number.className = "value";
    number.textContent = shown(value);
    track.className = "track";
    fill.className = value < 0 ? "below" : "above";
    fill.style.height = `${Math.abs(value) * 50}%`;
    track.append(fill);
    label.className = "level";
    label.textContent = level;
    item.append(number, track, label);
    return item;
  }
}

const shown = (value) => value.toFixed(2).replace("-", "−").replace("−0.00", "0.00");
const minus = (a, b) => a.map((x, i) => x - b[i]);
const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const cosine = (a, b) => dot(a, b) / (Math.sqrt(dot(a, a) * dot(b, b)) || 1);

/** Little-endian float32 in base64. */
function floats(text) {
  const view = new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  return Array.from({ length: view.byteLength / 4 }, (_, i) => view.getFloat32(4 * i, true));
}
