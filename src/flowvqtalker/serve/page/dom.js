// Elements, sentences next to fields, and the one dialog. Text from outside only ever becomes text, never markup.

export const $ = (id) => document.getElementById(id);

export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value; else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export const show = (id, shown = true) => { $(id).hidden = !shown; };

const PLACES = {
  face: "portrait", emotion_track: "emotion", intensity: "emotion", transition: "emotion", emotion_reference: "emotion",
};

/** Say what is wrong next to the field, open what hides it, and lead the keyboard there. */
export function fail(field, error) {
  const named = PLACES[field] ?? field;
  const place = $(`problem-${named}`) ?? ($(`option-${named}`) ? $("problem-options") : $("problem-form"));
  place.textContent = error.message ?? error;
  const details = place.closest("details");
  if (details) details.open = true;
  place.scrollIntoView({ block: "nearest", behavior: "smooth" });
  const input = $(named) ?? $(`option-${named}`);
  if (input?.matches("input, select, textarea")) {
    input.setAttribute("aria-invalid", "true");
    input.focus({ preventScroll: true });
  }
}

export function clear(...fields) {
  for (const field of fields) {
    $(`problem-${field}`).textContent = "";
    $(field)?.removeAttribute("aria-invalid");
  }
}

export const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

/** Whether the user says yes; with `token` the text of the password field, or null. */
export function ask(text, yes, token = false) {
  const dialog = $("dialog");
  $("dialog-text").textContent = text;
  $("dialog-yes").textContent = yes;
  $("dialog-token").hidden = !token;
  $("dialog-token").value = "";
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const agreed = dialog.returnValue === "yes";
      resolve(token ? (agreed ? $("dialog-token").value.trim() : null) : agreed);
    }, { once: true });
  });
}

/** Hand dropped files of a zone, and those chosen in its input, to `take`. */
export function dropZone(zone, input, take) {
  input.addEventListener("change", () => { if (input.files[0]) take(input.files[0]); input.value = ""; });
  zone.addEventListener("dragover", (event) => { event.preventDefault(); zone.classList.add("over"); });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}

/** The camera or the microphone; errors are sentences. */
export async function device(kinds) {
  const name = kinds.video ? "camera" : "microphone";
  if (!navigator.mediaDevices) {
    throw new Error(`Browsers give the ${name} only to pages opened with https or on the same machine. Choose a file instead.`);
  }
  try {
    return await navigator.mediaDevices.getUserMedia(kinds);
  } catch (error) {
    throw new Error(error.name === "NotAllowedError"
      ? `The browser does not let this page use the ${name}. Allow it beside the address, then try again.`
      : `No ${name} can be used (${error.message}). Choose a file instead.`);
  }
}
export const release = (stream) => stream?.getTracks().forEach((track) => track.stop());
