// More options: the page asks the server which ones there are, so that new ones appear by themselves.
import { $, el } from "./dom.js";

// Options that have a place of their own on the page.
const ELSEWHERE = new Set(["emotion", "intensity", "emotion_track", "face", "num_samples", "consent", "name"]);
// Plain words for the known ones, in this order; others show their name and the server's help.
const WORDS = {
  seed: ["Seed", "Another number gives other movements, the same number the same ones."],
  full: ["Whole photo", "Keep the whole photo instead of the square around the face."],
  label: ["Visible label", "Write “AI-generated” in the corner."],
  fixed_pose: ["Hold the head still", "The face moves and the eyes blink."],
  pose_scale: ["Head movement", "0 is none, 1 as learnt, 2 twice as much."],
  pose_from: ["Head movement from a clip", "Take the movement of the head from this clip."],
  articulation: ["Lip movement", "Empty is what suits; 0 is none, at most 3."],
  blink_rate: ["Blinks per minute", "Empty is what suits, at most 60."],
  temperature: ["Liveliness", "How much the movement varies, 0 to 2."],
  emotion_reference: ["Emotion from a photo or clip", "Of anyone; it takes the place of the buttons."],
  reference_neutral: ["The same person, neutral", "Without it, it is estimated."],
  valence: ["Valence", "How pleasant, −1 to 1; takes the place of the buttons."],
  arousal: ["Arousal", "How excited, −1 to 1; takes the place of the buttons."],
  audio_track: ["Sound track", "Which one of a file with several, from 0."],
  transition: ["Seconds of a change", "How long a change of emotion takes."],
};
let options = [];

export function setUp(given) {
  const order = Object.keys(WORDS);
  const rank = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
  options = given.filter(({ name }) => !ELSEWHERE.has(name)).sort((a, b) => rank(a.name) - rank(b.name));
  $("options").replaceChildren(...options.map(({ name, type, default: usual, min, max, help }) => {
    const [title, text] = WORDS[name] ?? [name.replaceAll("_", " "), help ?? ""];
    const input = el("input", { id: `option-${name}`, type: { boolean: "checkbox", file: "file", string: "text" }[type] ?? "number" });
    if (input.type === "checkbox") input.checked = Boolean(usual);
    else if (input.type !== "file") input.value = usual ?? "";
    if (input.type === "number") {
      Object.assign(input, { min: min ?? "", max: max ?? "", step: type === "integer" ? 1 : "any", placeholder: usual ?? "automatic" });
    }
    input.addEventListener("input", () => { $("problem-options").textContent = ""; input.removeAttribute("aria-invalid"); });
    return el("label", { className: "option" }, input, el("span", {}, title, el("small", {}, text)));
  }));
}

/** Fields of the options that differ from their defaults. */
export function chosenOptions() {
  const chosen = {};
  for (const { name, default: usual } of options) {
    const input = $(`option-${name}`);
    if (input.type === "checkbox") { if (input.checked !== Boolean(usual)) chosen[name] = input.checked; }
    else if (input.type === "file") chosen[name] = input.files[0];
    else if (input.validity.badInput) throw Object.assign(new Error("Please enter a number."), { field: name });
    else if (input.value !== String(usual ?? "")) chosen[name] = input.value || undefined;
  }
  return chosen;
}
export const seed = () => Number($("option-seed")?.value || 0);
export const setSeed = (value) => { if ($("option-seed")) $("option-seed").value = value; };
