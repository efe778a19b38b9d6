// The API key: asked for when the service wants one, kept for this tab alone.

const NAME = "prg-key";
let asking = null;

export const key = () => sessionStorage.getItem(NAME);

export function forget() {
  sessionStorage.removeItem(NAME);
}

/** Ask for a key; several calls at once share one question. Resolves to whether there is one now. */
export function ask(why) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    document.getElementById("key-why").textContent = why;
    field.value = "";
    dialog.returnValue = "";
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "use" && field.value.trim();
        if (given) sessionStorage.setItem(NAME, given);
        asking = null;
        resolve(Boolean(given));
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}
