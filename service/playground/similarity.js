// How alike two pictures are: the cosine of their embeddings.

import { call, formOf } from "./api.js";
import { curl, showDone } from "./curl.js";
import { Panel } from "./panel.js";

const $ = (id) => document.getElementById(id);

export class Similarity extends Panel {
  constructor() {
    super($("similarity"));
    this.number = this.element.querySelector(".number");
    this.what = this.element.querySelector(".what");
  }

  use(model) {
    this.model = model;
    this.stop();
    this.clear();
  }

  clear() {
    this.number.textContent = "";
    this.what.textContent = this.first && this.second ? "" : "Choose two pictures to compare.";
    this.done.replaceChildren();
  }

  show(first = this.first, second = this.second) {
    Object.assign(this, { first, second });
    if (!first || !second || !this.model) return;
    const options = { model: this.model.name };
    this.run(async (signal) => {
      const { body, ms } = await call("embed", { form: formOf([first, second], options), signal });
      const bad = body.data.find((item) => item.error);
      if (bad) throw Object.assign(new Error(`Picture ${bad.index + 1}: ${bad.error.detail}.`), { again: false });
      const [a, b] = body.data.map((item) => item.embedding);
      this.number.textContent = cosine(a, b).toFixed(2).replace("-", "−").replace("−0.00", "0.00");
      this.what.textContent =
        body.feature === "embedding"
          ? `cosine of the ${body.dim} numbers at t_end ${body.t_end}`
          : `of ${body.feature} at t_end ${body.t_end}, in which any two pictures look alike: this model has no embedding`;
      showDone(this.done, "/embed", ms, curl("embed", [first, second], options));
    }).then(() => {
      if (this.element.classList.contains("failed")) this.clear();
    });
  }
}

const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const cosine = (a, b) => dot(a, b) / (Math.sqrt(dot(a, a) * dot(b, b)) || 1);
