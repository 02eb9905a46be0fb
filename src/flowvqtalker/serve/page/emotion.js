// The emotion: one for the whole video, or several over time, edited over the waveform of the speech.
// The buttons and the intensity always change the part that is selected; at first there is one part.
import { $, clear, el, show } from "./dom.js";
import { speech } from "./speech.js";

const GAP = 0.1; // least seconds of a part
const whole = () => ({ time: 0, emotion: "neutral", intensity: 1 });
let parts = [whole()];
let selected = 0;
let peaks = [];

/** What the API takes: `emotion` and `intensity`, or `emotion_track`. */
export function chosenEmotion() {
  if (parts.length > 1) return { emotion_track: JSON.stringify(parts) };
  return { emotion: parts[0].emotion, intensity: parts[0].intensity };
}
export const selectedEmotion = () => parts[selected];

export function setUp(emotions) {
  $("emotions").replaceChildren(...emotions.map(({ id, name }) => {
    const input = el("input", { type: "radio", name: "emotion", value: id, id: `emotion-${id}`, className: "unseen" });
    const face = el("img", { src: `/page/emotions/${id}.jpg`, alt: "", width: 64, height: 64 });
    face.addEventListener("error", () => face.remove());
    input.addEventListener("change", () => { parts[selected].emotion = id; changed(); });
    return el("label", { className: "emotion" }, input, face, el("span", {}, name));
  }));
  $("intensity").addEventListener("input", () => { parts[selected].intensity = Number($("intensity").value); changed(); });
  document.addEventListener("speech", (event) => load(event.detail));
  $("add").addEventListener("click", add);
  $("remove").addEventListener("click", () => { parts.splice(selected, 1); select(selected - 1); });
  setUpPlayer();
  new ResizeObserver(draw).observe($("wave"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  select(0);
}

function changed() {
  clear("emotion");
  const { emotion, intensity } = parts[selected];
  const button = $(`emotion-${emotion}`);
  if (button) button.checked = true;
  $("intensity").value = intensity;
  $("intensity-value").textContent = `${Math.round(100 * intensity)} %`;
  $("emotion-legend").textContent = parts.length > 1 ? `Emotion of part ${selected + 1}` : "Emotion";
  show("remove", selected > 0);
  $("timeline-note").textContent = parts.length > 1
    ? "The buttons above change the selected part. Drag a border, or move it with the arrow keys."
    : "One emotion for the whole video. Choose a place in the waveform to change it there.";
  render();
  document.dispatchEvent(new Event("emotion"));
}
const select = (part) => { selected = part; changed(); };

function add() {
  const end = (part) => parts[part + 1]?.time ?? speech.seconds;
  let time = $("audio").currentTime;
  let part = parts.findLastIndex((one) => one.time <= time);
  if (time - parts[part].time < GAP || end(part) - time < GAP) {
    // The place is taken: halve the selected part instead.
    part = selected;
    time = (parts[part].time + end(part)) / 2;
  }
  if (end(part) - parts[part].time < 2 * GAP) return;
  parts.splice(part + 1, 0, { ...parts[part], time: Math.round(100 * time) / 100 });
  select(part + 1);
  $(`emotion-${parts[selected].emotion}`)?.focus();
}

// ---- the track ---------------------------------------------------------------------------------------------------
function render() {
  const focused = document.activeElement?.id;
  $("track").replaceChildren(...parts.flatMap(({ emotion }, part) => {
    const label = el("button", { type: "button", className: "part", id: `part-${part}` });
    label.setAttribute("aria-pressed", part === selected);
    label.setAttribute("data-emotion", emotion);
    label.addEventListener("click", () => { select(part); $("audio").currentTime = parts[part].time; });
    if (!part) return [label];
    const border = el("i", { className: "border", id: `border-${part}`, tabIndex: 0, role: "slider" });
    border.setAttribute("aria-label", `Start of part ${part + 1} in seconds`);
    border.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -0.1, ArrowRight: 0.1, PageDown: -1, PageUp: 1 }[event.key];
      if (step) move(part, parts[part].time + step);
      else if (event.key === "Delete") { parts.splice(part, 1); select(part - 1); $(`part-${part - 1}`).focus(); }
      else return;
      event.preventDefault();
    });
    border.addEventListener("pointerdown", (event) => border.setPointerCapture(event.pointerId));
    border.addEventListener("pointermove", (event) => {
      if (border.hasPointerCapture(event.pointerId)) move(part, timeAt(event, $("track")));
    });
    return [label, border];
  }));
  place();
  if (focused && $(focused) !== document.activeElement) $(focused)?.focus();
}

/** Positions and texts of what render() made; alone while a border moves, which must stay the same element. */
function place() {
  const percent = (time) => `${100 * time / (speech.seconds || 1)}%`;
  parts.forEach(({ time, emotion, intensity }, part) => {
    const end = parts[part + 1]?.time ?? speech.seconds;
    const text = intensity === 1 ? emotion : `${emotion} ${Math.round(100 * intensity)} %`;
    Object.assign($(`part-${part}`).style, { left: percent(time), width: percent(end - time) });
    $(`part-${part}`).textContent = text;
    $(`part-${part}`).title = `${text}, ${time.toFixed(1)} to ${end.toFixed(1)} seconds`;
    const border = $(`border-${part}`);
    if (!border) return;
    border.style.left = percent(time);
    for (const [name, value] of [["valuenow", time.toFixed(2)], ["valuemin", 0], ["valuemax", speech.seconds]]) {
      border.setAttribute(`aria-${name}`, value);
    }
  });
}

function move(part, time) {
  const last = (parts[part + 1]?.time ?? speech.seconds) - GAP;
  parts[part].time = Math.round(100 * Math.min(last, Math.max(parts[part - 1].time + GAP, time))) / 100;
  place();
}

// ---- the waveform and its player ---------------------------------------------------------------------------------
const timeAt = (event, track) => {
  const { left, width } = track.getBoundingClientRect();
  return Math.min(1, Math.max(0, (event.clientX - left) / width)) * speech.seconds;
};

/** A new recording (a file), or null when it was taken away. Parts that begin after its end go. */
async function load(sound) {
  show("timeline", Boolean(sound));
  if (!sound) return;
  peaks = [];
  parts = parts.filter((part) => part.time < speech.seconds - GAP);
  $("wave").setAttribute("aria-valuemax", speech.seconds);
  select(Math.min(selected, parts.length - 1));
  try {
    // Half an hour at this rate takes 55 MB; longer recordings, and formats only the server reads, show a line.
    if (speech.seconds > 1800) throw new RangeError("too long");
    const decoded = await new OfflineAudioContext(1, 1, 8000).decodeAudioData(await sound.arrayBuffer());
    const samples = decoded.getChannelData(0);
    const step = Math.max(1, Math.floor(samples.length / 1000));
    for (let at = 0; at < samples.length; at += step) {
      let peak = 0;
      for (let i = at; i < Math.min(at + step, samples.length); i++) peak = Math.max(peak, Math.abs(samples[i]));
      peaks.push(peak);
    }
  } catch { peaks = [0, 0]; }
  draw();
}

function draw() {
  const canvas = $("wave").querySelector("canvas");
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width) return;
  Object.assign(canvas, { width: width * devicePixelRatio, height: height * devicePixelRatio });
  const pen = canvas.getContext("2d");
  pen.scale(devicePixelRatio, devicePixelRatio);
  pen.fillStyle = getComputedStyle(canvas).color;
  const loudest = Math.max(0.05, ...peaks);
  for (let x = 0; x < width; x += 3) {
    const peak = Math.max(0, ...peaks.slice(Math.floor(x / width * peaks.length), Math.ceil((x + 3) / width * peaks.length)));
    const half = Math.max(1, peak / loudest * (height / 2 - 4));
    pen.fillRect(x, height / 2 - half, 2, 2 * half);
  }
}

function setUpPlayer() {
  const audio = $("audio");
  const seek = (time) => { audio.currentTime = Math.min(speech.seconds, Math.max(0, time)); };
  const toggle = () => { if (audio.paused) audio.play(); else audio.pause(); };
  const follow = () => {
    $("playhead").style.left = `${100 * audio.currentTime / (speech.seconds || 1)}%`;
    $("wave").setAttribute("aria-valuenow", audio.currentTime.toFixed(1));
    if (!audio.paused) requestAnimationFrame(follow);
  };
  for (const name of ["play", "pause", "seeked", "loadedmetadata"]) {
    audio.addEventListener(name, () => { $("play").textContent = audio.paused ? "Play" : "Pause"; follow(); });
  }
  $("play").addEventListener("click", toggle);
  $("wave").addEventListener("pointerdown", (event) => { $("wave").setPointerCapture(event.pointerId); seek(timeAt(event, $("wave"))); });
  $("wave").addEventListener("pointermove", (event) => {
    if ($("wave").hasPointerCapture(event.pointerId)) seek(timeAt(event, $("wave")));
  });
  $("wave").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -0.1, ArrowRight: 0.1, PageDown: -1, PageUp: 1, Home: -Infinity, End: Infinity }[event.key];
    if (step) seek(audio.currentTime + step); else if (event.key === " ") toggle(); else return;
    event.preventDefault();
  });
}
