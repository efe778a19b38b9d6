// Pictures: chosen, dropped, pasted, or the page's own.

const SCENES = { ship: "a ship", airplane: "an airplane", car: "a car", cup: "a cup of coffee" };

/** One of the page's own files as {blob, name}. */
export async function ownPicture(path) {
  const response = await fetch(`playground/${path}`);
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return { blob: await response.blob(), name: path.split("/").pop() };
}

/** Buttons with the page's drawings. */
export function sceneButtons(place, verb, chosen) {
  for (const [name, what] of Object.entries(SCENES)) {
    const button = document.createElement("button");
    const image = document.createElement("img");
    button.type = "button";
    button.setAttribute("aria-label", `${verb} the drawing of ${what}`);
    image.src = `playground/scenes/${name}.jpg`;
    image.alt = "";
    button.append(image);
    button.addEventListener("click", async () => chosen(await ownPicture(`scenes/${name}.jpg`)));
    place.append(button);
  }
}

/** A place that shows a picture and, where it has a file field, takes one. */
export class Slot {
  constructor(element, chosen) {
    this.element = element;
    this.image = element.querySelector("img");
    this.caption = element.querySelector(".name");
    const field = element.querySelector("input");
    field?.addEventListener("change", () => {
      if (field.files[0]) chosen(fromFile(field.files[0]));
      field.value = ""; // so that the same file can be chosen again
    });
    this.chosen = chosen;
  }

  show({ blob, name }) {
    URL.revokeObjectURL(this.image.src);
    this.image.onerror = () => {
      this.image.hidden = true; // such as TIFF: the service reads it, the browser does not
      this.caption.textContent = `${name} (no preview here)`;
    };
    this.image.src = URL.createObjectURL(blob);
    this.image.alt = name;
    this.image.hidden = false;
    this.caption.textContent = name;
    this.element.classList.add("filled");
  }
}

/** Drops on a slot go to it, drops elsewhere and whatever is pasted to the first. */
export function takeDropsAndPastes(slots) {
  const [first] = slots;
  const slotAt = (event) => slots.find((slot) => slot.element.contains(event.target)) ?? first;
  const light = (slot) => slots.forEach((one) => one.element.classList.toggle("over", one === slot));
  let depth = 0;
  addEventListener("dragenter", () => depth++);
  addEventListener("dragleave", () => --depth || light(null));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    light(slotAt(event));
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    light(null);
    const file = event.dataTransfer.files[0];
    if (file) slotAt(event).chosen(fromFile(file));
  });
  addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (!file) return;
    event.preventDefault();
    slotAt({ target: document.activeElement }).chosen(fromFile(file));
  });
}

const fromFile = (file) => ({ blob: file, name: file.name || "pasted.png" });
