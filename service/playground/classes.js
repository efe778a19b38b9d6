// The classes of a picture, as bars.

import { call, formOf } from "./api.js";
import { curl, showDone } from "./curl.js";
import { Panel } from "./panel.js";

const $ = (id) => document.getElementById(id);

export class Classes extends Panel {
  constructor() {
    super($("classes"));
    this.bars = this.element.querySelector(".bars");
    this.empty = this.element.querySelector(".empty");
    this.known = this.element.querySelector(".known");
    for (const picker of [$("count"), $("level")]) picker.addEventListener("change", () => this.show());
  }

  /** Set the model; one without labels has no classes. */
  use(model) {
    this.model = model;
    this.stop();
    this.bars.replaceChildren();
    this.known.textContent = "";
    this.done.replaceChildren();
    const { labels, classify_t_end: levels } = model;
    this.empty.hidden = false;
    this.empty.textContent = labels
      ? "A picture's most probable classes appear here."
      : `${model.name} was only pretrained: it has no classes. Its embeddings, below, need none.`;
    $("count-picker").hidden = !labels;
    $("level-picker").hidden = !labels || levels.length < 2;
    $("level").replaceChildren(...(levels ?? []).map((level) => new Option(level)));
    $("caveat").hidden = !labels;
    $("caveat").textContent = labels ? caveat(model) : "";
  }

  show(picture = this.picture) {
    this.picture = picture;
    if (!picture || !this.model?.labels) return;
    const options = { model: this.model.name, top_k: $("count").value };
    if (this.model.classify_t_end.length > 1) options.t_end = $("level").value;
    this.run(async (signal) => {
      const { body, ms } = await call("classify", { form: formOf([picture], options), signal });
      this.empty.hidden = true;
      this.bars.replaceChildren(...body.data[0].predictions.map(bar));
      this.known.textContent = typical(body.data[0].known);
      showDone(this.done, "/classify", ms, curl("classify", [picture], options));
    }).then(() => {
      if (!this.element.classList.contains("failed")) return;
      this.bars.replaceChildren();
      this.known.textContent = "";
    });
  }
}

function bar({ label, probability }) {
  const item = document.createElement("li");
  const name = document.createElement("span");
  const number = document.createElement("span");
  const track = document.createElement("span");
  const fill = document.createElement("span");
  name.className = "label";
  name.textContent = label;
  number.className = "percent";
  number.textContent = `${(probability * 100).toFixed(1)} %`;
  track.className = "track";
  fill.style.width = `${Math.max(probability * 100, 0.4)}%`;
  track.append(fill);
  item.append(name, number, track);
  return item;
}

/** How typical the picture is of what the classes were learned from; nothing where that was not measured. */
function typical(known) {
  if (known === undefined) return "";
  if (known < 0.01) return "Unlike the pictures that these classes were learned from: better not believe it.";
  return `Of pictures of these classes, ${Math.round(known * 100)} % are less typical than this one.`;
}

/** What these classes can't say, in plain words. */
function caveat({ labels, accuracy }) {
  const count = labels.length === 10 ? "ten" : labels.length;
  const names = labels.length <= 20 ? `: ${labels.join(", ")}` : "";
  const [measured] = accuracy ?? [];
  const right = measured
    ? ` On the ${measured.images.toLocaleString("en")} pictures of ${measured.data} it is right ${(measured.top1 * 100).toFixed(1)} % of the time.`
    : "";
  return `This model knows ${count} classes${names}. For most photos it has none, and names one of these all the same, however sure it looks.${right}`;
}
