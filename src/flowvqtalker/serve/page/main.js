// Start of the page: asks the server what it can do, then connects the parts.
import { api, form, session } from "./api.js";
import { $, clear, fail, show } from "./dom.js";
import * as emotion from "./emotion.js";
import * as history from "./history.js";
import * as live from "./live.js";
import * as options from "./options.js";
import * as portraits from "./portrait.js";
import * as results from "./result.js";
import * as speeches from "./speech.js";

function setMode() {
  const mode = $("mode-live").checked ? "live" : "video";
  for (const part of document.querySelectorAll("[data-mode]")) part.hidden = part.dataset.mode !== mode;
  if (mode === "video") { live.end(); show("timeline", Boolean(speeches.speech.id)); }
  $("audio").pause();
}

/** Ask for a video with what is chosen. */
async function make() {
  clear("emotion", "options", "form");
  const { portrait } = portraits;
  const wanted = [
    ["speech", speeches.speech.id, "Choose or record the speech first."],
    ["consent", $("consent").checked, "Please confirm that you may use this photo."],
    ["portrait", portrait.id, "Choose a photo first."], // the last one gets the focus: it is the first on the page
  ];
  const missing = wanted.filter(([, there]) => !there);
  // What is said already, such as why a photo cannot be used, says more.
  for (const [field, , text] of missing) fail(field, $(`problem-${field}`).textContent || text);
  if (missing.length) return;
  $("make").disabled = true;
  try {
    const more = options.chosenOptions();
    const replaced = ["emotion_reference", "valence", "arousal"].some((name) => more[name] !== undefined);
    const feeling = replaced ? { intensity: emotion.selectedEmotion().intensity } : emotion.chosenEmotion();
    await results.make({
      portrait_id: portrait.id, face: portrait.face, speech_id: speeches.speech.id, consent: "true", ...feeling,
      num_samples: $("num_samples").value, ...more,
    });
  } catch (problem) { fail(problem.field ?? "form", problem); }
  $("make").disabled = false;
}

async function example() {
  const [photo, sound] = await Promise.all(["example.jpg", "example.ogg"].map(async (name) => (await fetch(`/page/${name}`)).blob()));
  speeches.take(new File([sound], "example.ogg"), "Example");
  portraits.take(new File([photo], "example.jpg"));
}

async function verify() {
  const file = $("verify").files[0];
  $("verify").value = "";
  if (!file) return;
  $("verify-answer").textContent = "Looking …";
  try {
    $("verify-answer").textContent = (await api("/v1/verify", { fields: form({ file }) })).note;
  } catch (problem) { $("verify-answer").textContent = problem.message; }
}

async function begin() {
  $("form").reset(); // Firefox keeps ticks over a reload; the consent belongs to one photo.
  try {
    await session();
    const [health, emotions, list] = await Promise.all([api("/health"), api("/v1/emotions"), api("/v1/options")]);
    portraits.setUp(health.limits);
    speeches.setUp(health.limits, health.features.tts);
    emotion.setUp(emotions.data);
    options.setUp(list.data);
    results.setUp();
    history.setUp();
    live.setUp();
    show("modes", health.features.live);
  } catch (problem) { return fail("form", problem); }
  for (const mode of ["mode-video", "mode-live"]) $(mode).addEventListener("change", setMode);
  setMode();
  $("form").addEventListener("submit", (event) => { event.preventDefault(); make(); });
  const more = (count) => {
    options.setSeed(options.seed() + Number($("num_samples").value));
    $("num_samples").value = count;
    make();
  };
  $("other-seed").addEventListener("click", () => more(1));
  $("four").addEventListener("click", () => more(4));
  // A file dropped beside the fields must not replace the page.
  for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
  $("verify").addEventListener("change", verify);
  $("example").addEventListener("click", example);
  document.documentElement.dataset.ready = "true";
  const running = await history.restore();
  return running && results.watch(running);
}

begin();
