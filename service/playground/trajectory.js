// The reverse trajectory: states from the picture towards noise, as a strip and by a slider.

import { call, formOf } from "./api.js";
import { curl, showDone } from "./curl.js";
import { Panel } from "./panel.js";
import { draw, scaleOf, SIDE } from "./states.js";

const $ = (id) => document.getElementById(id);
/** Those of the strip: denser near the picture, where most changes. A request takes eight. */
export const LEVELS = [1, 0.9, 0.8, 0.7, 0.55, 0.4, 0.2, 0];
const STOPS = Array.from({ length: 21 }, (_, i) => 1 - i / 20).map((t) => Number(t.toFixed(2)));
const PLAY_MS = 90;

export class Trajectory extends Panel {
  constructor() {
    super($("trajectory"));
    this.states = new Map();
    this.strip = this.element.querySelector(".strip");
    this.slider = $("t-end");
    this.slider.addEventListener("input", () => this.stopPlaying() || this.shown());
    $("fit").addEventListener("change", () => this.redraw());
    $("play").addEventListener("click", () => (this.playing ? this.stopPlaying() : this.play()));
  }

  use(model) {
    this.model = model;
    this.stop();
    this.clear();
    const one = model.steps === 1;
    $("trajectory-note").textContent =
      `The features are read at ${model.t_end}. Pictures are the state averaged to ${SIDE} × ${SIDE}; what is beyond black or white is cut off unless you fit the range.` +
      (one ? " This model goes the whole way in one straight step, so its states keep the outline and grow in colour instead of turning into noise." : "");
  }

  clear() {
    this.stopPlaying();
    this.states.clear();
    this.strip.hidden = this.element.querySelector(".stage").hidden = true;
    this.element.querySelector(".empty").hidden = false;
    this.done.replaceChildren();
  }

  /** The level that the slider stands at; it counts how far back. */
  get level() {
    return Number((1 - this.slider.value).toFixed(2));
  }

  show(picture = this.picture) {
    this.picture = picture;
    if (!picture || !this.model) return;
    this.run(async (signal) => {
      this.states.clear();
      const options = { model: this.model.name, feature: "state", t_end: LEVELS };
      const [scale, { body, ms }] = await Promise.all([
        scaleOf(this.model),
        call("embed", { form: formOf([picture], options), signal }),
      ]);
      this.scale = scale;
      this.keep(body);
      showDone(this.done, "/embed", ms, curl("embed", [picture], options));
      this.element.querySelector(".empty").hidden = true;
      this.strip.hidden = this.element.querySelector(".stage").hidden = false;
      this.strip.replaceChildren(...LEVELS.map((level) => this.thumb(level)));
      this.redraw();
      // What the slider may ask for next, so that it answers at once.
      const rest = STOPS.filter((level) => !this.states.has(level));
      while (rest.length) {
        const more = { ...options, t_end: rest.splice(0, 8) };
        this.keep((await call("embed", { form: formOf([picture], more), signal })).body);
        this.shown();
      }
    }).then(() => {
      if (this.element.classList.contains("failed") && !this.states.size) this.clear();
    });
  }

  keep({ data: [item] }) {
    for (const { t_end: level, embedding } of item.embeddings) this.states.set(level, embedding);
  }

  thumb(level) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIDE;
    button.type = "button";
    button.dataset.level = level;
    button.setAttribute("aria-label", `Stop at ${level.toFixed(2)}`);
    button.append(canvas, level === this.model.t_end ? `${level} ●` : String(level));
    if (level === this.model.t_end) button.title = "where this model reads its features";
    button.addEventListener("click", () => {
      this.stopPlaying();
      this.slider.value = 1 - level;
      this.shown();
    });
    item.append(button);
    return item;
  }

  redraw() {
    if (!this.scale) return;
    for (const button of this.strip.querySelectorAll("button"))
      draw(button.firstChild, this.states.get(Number(button.dataset.level)), this.scale, $("fit").checked);
    this.shown();
  }

  /** The large picture, at the slider's level. */
  shown() {
    const { level } = this;
    const text = level.toFixed(2);
    $("t-end-shown").textContent = `t_end = ${text}`;
    this.slider.setAttribute("aria-valuetext", `t_end ${text}`);
    for (const button of this.strip.querySelectorAll("button"))
      button.setAttribute("aria-pressed", Number(button.dataset.level) === level);
    const state = this.states.get(level);
    if (!state || !this.scale) return; // it is on its way
    draw($("state"), state, this.scale, $("fit").checked);
    $("state").setAttribute("aria-label", `The state at t_end ${text}`);
  }

  /** From the picture to noise, and back to where the slider stood. */
  play() {
    const home = this.slider.value;
    let at = 0;
    $("play").textContent = "Stop";
    this.playing = setInterval(() => {
      if (at > 20) {
        this.stopPlaying();
        this.slider.value = home;
      } else {
        this.slider.value = at++ / 20;
      }
      this.shown();
    }, PLAY_MS);
  }

  stopPlaying() {
    clearInterval(this.playing);
    this.playing = null;
    $("play").textContent = "Play";
  }
}
