// A card whose content comes from the service: one call at a time, the newest wins, errors in words.

export class Panel {
  constructor(element) {
    this.element = element;
    this.status = element.querySelector(".status");
    this.done = element.querySelector(".done");
    this.running = null;
  }

  /** Run `work(signal)`; a newer run ends an older one. */
  async run(work) {
    this.running?.abort();
    const mine = (this.running = new AbortController());
    this.say("");
    this.element.setAttribute("aria-busy", "true");
    try {
      await work(mine.signal);
    } catch (error) {
      if (mine.signal.aborted) return;
      this.element.classList.add("failed");
      this.say(error.message, error.again === false ? null : () => this.run(work));
    } finally {
      if (this.running === mine) this.element.removeAttribute("aria-busy");
    }
  }

  stop() {
    this.running?.abort();
    this.element.removeAttribute("aria-busy");
    this.say("");
  }

  /** Show a sentence of trouble, with a button to try again where that may help; once on the page where not. */
  say(text, again) {
    this.element.classList.toggle("failed", Boolean(text));
    const said = [...document.querySelectorAll(".status")].some((other) => other !== this.status && other.textContent === text);
    this.status.replaceChildren(said && !again ? "" : text);
    if (!text || !again) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Try again";
    button.addEventListener("click", again);
    this.status.append(" ", button);
  }
}
