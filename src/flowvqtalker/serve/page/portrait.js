// The photo: from a file, the clipboard or the camera; its faces to choose from.
import { api, form } from "./api.js";
import { $, clear, device, dropZone, el, fail, release, show } from "./dom.js";

/** What the server knows of the photo: `id`, and `face`, the one that will talk. */
export const portrait = { id: null, face: 0 };
let photo = null;
let stream = null;
let limits = {};

export function setUp(given) {
  limits = given;
  dropZone($("portrait-drop"), $("portrait"), take);
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) take(file);
  });
  $("portrait-again").addEventListener("click", () => { reset(); $("portrait").focus(); });
  $("consent").addEventListener("change", () => {
    clear("consent");
    if ($("consent").checked && photo && !portrait.id) upload();
  });
  $("camera").addEventListener("click", openCamera);
  $("camera-stop").addEventListener("click", closeCamera);
  $("camera-take").addEventListener("click", () => {
    const view = $("camera-view");
    const canvas = el("canvas", { width: view.videoWidth, height: view.videoHeight });
    canvas.getContext("2d").drawImage(view, 0, 0);
    closeCamera();
    canvas.toBlob((blob) => take(new File([blob], "camera.jpg", { type: "image/jpeg" })), "image/jpeg", 0.95);
  });
}

async function openCamera() {
  clear("portrait");
  try {
    stream = await device({ video: { facingMode: "user", width: { ideal: 1280 }, height: { ideal: 960 } } });
    $("camera-view").srcObject = stream;
    await $("camera-view").play();
    show("camera-box");
    show("portrait-empty", false);
    $("camera-take").focus();
  } catch (error) { closeCamera(); fail("portrait", error); }
}

function closeCamera() {
  release(stream);
  stream = null;
  show("camera-box", false);
  show("portrait-empty");
}

function reset() {
  photo = portrait.id = null;
  portrait.face = 0;
  show("portrait-shown", false);
  show("portrait-empty");
  clear("portrait", "consent");
}

export function take(file) {
  reset();
  if (file.size > limits.max_upload_bytes) {
    return fail("portrait", `The photo has ${Math.ceil(file.size / 1e6)} MB; at most ${Math.floor(limits.max_upload_bytes / 1e6)} MB are allowed.`);
  }
  photo = file;
  URL.revokeObjectURL($("portrait-image").src);
  $("portrait-image").src = URL.createObjectURL(file);
  $("faces").replaceChildren($("portrait-image"));
  $("portrait-note").textContent = "";
  show("crop-box", false);
  show("portrait-empty", false);
  show("portrait-shown");
  if ($("consent").checked) return upload();
  return fail("consent", "Please confirm that you may use this photo; then it is uploaded.");
}

async function upload() {
  const sent = photo;
  $("portrait-note").textContent = "Looking for faces …";
  try {
    const found = await api("/v1/portraits", { fields: form({ portrait: sent, consent: "true" }) });
    if (photo === sent) accept(found);
  } catch (problem) {
    if (photo !== sent) return;
    reset();
    fail(problem.field ?? "portrait", problem);
  }
}

/** Show the faces of an uploaded photo. The largest usable one is chosen. */
function accept(found) {
  portrait.id = found.id;
  const usable = found.faces.filter((face) => face.usable);
  $("portrait-image").src = `/v1/portraits/${found.id}/image`;
  const boxes = found.faces.map((face) => {
    const input = el("input", { type: "radio", name: "face", value: face.index, disabled: !face.usable, className: "unseen" });
    const box = el("label", { className: "face", title: face.problem?.detail ?? "" }, input, el("span", {}, `Face ${face.index + 1}`));
    const [left, top, right, bottom] = face.box;
    Object.assign(box.style, {
      left: `${100 * left / found.width}%`, top: `${100 * top / found.height}%`,
      width: `${100 * (right - left) / found.width}%`, height: `${100 * (bottom - top) / found.height}%`,
    });
    input.checked = face === usable[0];
    input.addEventListener("change", () => choose(face.index));
    return box;
  });
  $("faces").replaceChildren($("portrait-image"), ...boxes);
  if (!usable.length) {
    portrait.id = null;
    $("portrait-note").textContent = "";
    return fail("portrait", found.faces[0].problem.detail);
  }
  const note = found.faces.length > 1 ? `${found.faces.length} faces: choose the one that will talk.` : "One face found.";
  $("portrait-note").textContent = [note, ...found.warnings].join(" ");
  choose(usable[0].index);
}

function choose(face) {
  portrait.face = face;
  $("crop").src = `/v1/portraits/${portrait.id}/image?face=${face}`;
  show("crop-box");
  document.dispatchEvent(new Event("portrait"));
}
