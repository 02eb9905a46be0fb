// The speech: from a file, the microphone or a text.
import { api, form } from "./api.js";
import { $, clear, clock, device, dropZone, fail, release, show } from "./dom.js";

/** What the server knows of the speech: `id` and `seconds`. */
export const speech = { id: null, seconds: 0 };
let limits = {};
let newest = 0; // counts uploads, so that a slow answer does not replace a newer choice

export function setUp(given, texts) {
  limits = given;
  show("text-box", texts);
  dropZone($("speech-drop"), $("speech"), (file) => take(file, file.name));
  $("record").addEventListener("click", record);
  $("speech-again").addEventListener("click", () => { reset(); $("speech").focus(); });
  $("speak").addEventListener("click", () => {
    const text = $("text").value.trim();
    if (!text) return fail("speech", "Type what to say first.");
    return send({ json: { text } }, text.length > 40 ? `${text.slice(0, 40)}…` : text);
  });
}

function reset() {
  newest += 1;
  speech.id = null;
  $("audio").pause();
  show("speech-shown", false);
  show("speech-empty");
  clear("speech");
  document.dispatchEvent(new CustomEvent("speech", { detail: null }));
}

export function take(file, name) {
  if (file.size > limits.max_upload_bytes) {
    return fail("speech", `The file has ${Math.ceil(file.size / 1e6)} MB; at most ${Math.floor(limits.max_upload_bytes / 1e6)} MB are allowed.`);
  }
  return send({ fields: form({ speech: file }) }, name, file);
}

async function send(request, name, file) {
  reset();
  const mine = newest;
  $("speech-name").textContent = name;
  $("speech-note").textContent = "Uploading …";
  show("speech-empty", false);
  show("speech-shown");
  try {
    const found = await api("/v1/speech", request);
    if (mine !== newest) return;
    Object.assign(speech, { id: found.id, seconds: found.seconds });
    $("speech-note").textContent = `${found.seconds.toFixed(1)} seconds`;
    URL.revokeObjectURL($("audio").src);
    // A local file can be searched at once, also a recording whose header lacks its length.
    $("audio").src = file ? URL.createObjectURL(file) : `/v1/speech/${found.id}/content`;
    const sound = file ?? await (await fetch($("audio").src)).blob();
    document.dispatchEvent(new CustomEvent("speech", { detail: sound }));
  } catch (problem) {
    if (mine !== newest) return;
    reset();
    fail(problem.field ?? "speech", problem);
  }
}

/** Call `seen` with the loudness (0-1) of a microphone about 20 times a second until the returned function is called. */
export function meter(context, source, seen) {
  const analyser = new AnalyserNode(context, { fftSize: 1024 });
  const samples = new Float32Array(analyser.fftSize);
  source.connect(analyser);
  const timer = setInterval(() => {
    analyser.getFloatTimeDomainData(samples);
    seen(Math.min(1, 4 * Math.sqrt(samples.reduce((sum, value) => sum + value * value, 0) / samples.length)));
  }, 50);
  return () => clearInterval(timer);
}

async function record() {
  clear("speech");
  let stream;
  try {
    stream = await device({ audio: { channelCount: 1 } });
  } catch (error) { return fail("speech", error); }
  const context = new AudioContext();
  const started = performance.now();
  const recorder = new MediaRecorder(stream);
  const parts = [];
  let wanted = true;
  const stopMeter = meter(context, context.createMediaStreamSource(stream), (loudness) => {
    const seconds = (performance.now() - started) / 1000;
    $("record-level").value = loudness;
    $("record-time").value = clock(seconds);
    if (seconds >= limits.max_seconds - 1 && recorder.state === "recording") recorder.stop();
  });
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  recorder.addEventListener("stop", () => {
    stopMeter();
    release(stream);
    context.close();
    show("record-box", false);
    show("speech-empty");
    if (wanted) take(new File(parts, "recording.webm", { type: recorder.mimeType }), "Your recording");
  });
  $("record-stop").onclick = () => recorder.stop();
  $("record-cancel").onclick = () => { wanted = false; recorder.stop(); };
  show("speech-empty", false);
  show("record-box");
  $("record-stop").focus();
  return recorder.start(500);
}
