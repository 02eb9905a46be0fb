// One video from the request to its takes: progress with a preview, then a gallery to compare, keep and download.
import { api, follow, form } from "./api.js";
import { $, ask, clear, el, fail, show } from "./dom.js";
import { remember } from "./history.js";

const SAID = { queued: "Waiting", in_progress: "Rendering", completed: "The video is ready.", failed: "The video failed.", cancelled: "Cancelled." };
let stop = () => {}; // stops following the video before
let current = null;
let loading = false; // a preview is on its way

export function setUp() {
  $("cancel").addEventListener("click", async () => {
    try { await api(`/v1/videos/${current}/cancel`, { method: "POST" }); } catch (problem) { fail("result", problem); }
  });
  $("preview").addEventListener("load", () => { loading = false; show("preview"); });
  $("preview").addEventListener("error", () => { loading = false; });
}

/** Ask the server for a video with these fields and show how it comes about. */
export async function make(fields) {
  clear("form", "result", "options");
  const key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const video = await api("/v1/videos", { fields: form(fields), headers: { "Idempotency-Key": key } });
  remember(video, fields.emotion ?? (fields.emotion_track ? "changing emotion" : "other emotion"));
  watch(video);
}

/** Show a video, whatever state it is in, and follow it to its end. */
export function watch(video) {
  stop();
  current = video.id;
  clear("result");
  show("empty", false);
  show("again", false);
  show("preview", false);
  $("gallery").replaceChildren();
  update(video);
  stop = ["queued", "in_progress"].includes(video.status) ? follow(video.id, update) : () => {};
  if (innerWidth < 900) $("result").scrollIntoView({ block: "start", behavior: "smooth" });
}

const plural = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;

function stageText({ status, stage, frame, frames, queue_position: before }) {
  if (status === "queued") return before ? `Waiting: ${plural(before, "video")} before yours` : "Waiting for its turn";
  if (stage === "rendering" && frames) return `Frame ${frame} of ${frames}`;
  return { preparing: "Listening to the speech …", finishing: "Finishing …" }[stage] ?? "Working …";
}

function update(video) {
  const running = ["queued", "in_progress"].includes(video.status);
  show("job", running);
  document.title = running ? `${video.progress} % · FlowVQTalker` : "FlowVQTalker";
  // Screen readers are told the turns, not every frame.
  $("said").textContent = SAID[video.status];
  $("progress").value = video.progress ?? 0;
  $("stage").textContent = stageText(video);
  const pace = video.fps ? `${video.fps.toFixed(1)} fps` : "";
  const left = video.eta ? `about ${video.eta > 90 ? plural(Math.round(video.eta / 60), "minute") : plural(Math.ceil(video.eta), "second")} left` : "";
  $("eta").textContent = [left, pace].filter(Boolean).join(" · ");
  if (running && video.frame > 0 && !loading) {
    loading = true;
    $("preview").src = `/v1/videos/${video.id}/preview?frame=${video.frame}`;
  }
  for (const sample of video.samples ?? []) if (sample.ready && !$(`take-${sample.index}`)) addTake(video, sample);
  show("again", video.status === "completed");
  if (video.status === "cancelled") {
    show("empty", !$("gallery").children.length);
    $("problem-result").textContent = "Cancelled.";
  }
  if (video.status === "failed") {
    show("empty", !$("gallery").children.length);
    const { field, message } = video.error ?? {};
    fail(field ?? "result", message ?? "The video failed.");
  }
  if (!running) { $("result").dataset.status = video.status; remember(video); } else delete $("result").dataset.status;
}

function addTake(video, { index, seed }) {
  const address = `/v1/videos/${video.id}/content?sample=${index}`;
  // The browser's own controls would cover the mouth of a small take.
  const several = video.num_samples > 1;
  const player = el("video", { src: address, controls: !several, playsInline: true, preload: "auto" });
  player.setAttribute("aria-label", `Take ${index}`);
  const button = el("button", { type: "button", className: "play", hidden: !several }, "Play");
  const toggle = () => { if (player.paused) player.play(); else player.pause(); };
  button.addEventListener("click", toggle);
  if (several) player.addEventListener("click", toggle);
  player.addEventListener("pause", () => { button.textContent = "Play"; });
  player.addEventListener("play", () => {
    button.textContent = "Pause";
    for (const other of $("gallery").querySelectorAll("video")) if (other !== player) other.pause();
  });
  const link = (text, format) => el("a", { href: `${address}&format=${format}&download=true`, download: "" }, text);
  const discard = el("button", { type: "button", className: "quiet" }, "Discard");
  const keep = el("button", { type: "button", className: "quiet" }, "Keep only this");
  const card = el("article", { className: "take", id: `take-${index}` }, player,
    el("p", { className: "row" }, button, el("b", {}, several ? `Take ${index}` : "Your video"), el("small", {}, `seed ${seed}`)),
    el("p", { className: "row" }, link("Video", "mp4"), link("ARKit csv", "csv"), link("3D glb", "glb")),
    el("p", { className: "row" }, keep, discard));
  card.dataset.sample = index;
  const drop = async (cards) => {
    for (const one of cards) {
      try { await api(`/v1/videos/${video.id}/samples/${one.dataset.sample}`, { method: "DELETE" }); } catch (problem) { fail("result", problem); return; }
      one.remove();
    }
    $("gallery").querySelector("video")?.focus();
  };
  const others = () => [...$("gallery").children].filter((one) => one !== card);
  keep.hidden = !several;
  keep.addEventListener("click", async () => {
    if (others().length && await ask("Keep this take and delete the others?", "Delete the others")) drop(others());
  });
  discard.addEventListener("click", async () => {
    if (await ask("Delete this take?", "Delete it")) drop([card]);
  });
  $("gallery").append(card);
}
