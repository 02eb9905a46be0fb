// Live: the microphone goes to the server, pictures and sound come back and are shown by one clock, that of the sound.
import { Problem } from "./api.js";
import { $, clear, device, fail, release, show } from "./dom.js";
import { selectedEmotion } from "./emotion.js";
import { portrait } from "./portrait.js";
import { meter } from "./speech.js";

const DELAY = 0.08; // seconds between arrival and showing, against jitter
const STATES = { idle: "Idle", listening: "Listening", talking: "Talking" };
let live = null; // the session that runs

export function setUp() {
  $("live-start").addEventListener("click", start);
  $("live-stop").addEventListener("click", () => end());
  document.addEventListener("emotion", () => tell({ type: "emotion", ...emotionNow() }));
  document.addEventListener("portrait", () => tell({ type: "portrait", portrait_id: portrait.id, face: portrait.face }));
}
const emotionNow = () => ({ emotion: selectedEmotion().emotion, intensity: selectedEmotion().intensity });
const tell = (message) => { if (live?.socket.readyState === WebSocket.OPEN) live.socket.send(JSON.stringify(message)); };

async function start() {
  clear("live", "portrait", "consent");
  if (!portrait.id) return fail("portrait", "Choose a photo first.");
  if (!$("consent").checked) return fail("consent", "Please confirm that you may use this photo.");
  const session = { queue: [], shown: 0, base: null };
  try {
    session.stream = await device({ audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true } });
    session.context = new AudioContext();
    await session.context.resume();
    await session.context.audioWorklet.addModule("/page/worklet.js");
  } catch (error) {
    release(session.stream);
    return fail("live", error);
  }
  live = session;
  show("live-start", false);
  show("live-stop");
  show("live-level");
  $("live-state").textContent = "Loading …";
  const source = session.context.createMediaStreamSource(session.stream);
  session.stopMeter = meter(session.context, source, (loudness) => { $("live-level").value = loudness; });
  session.socket = new WebSocket(`${location.origin.replace("http", "ws")}/v1/live`);
  session.socket.binaryType = "arraybuffer";
  session.socket.addEventListener("open", () => tell({
    type: "start", portrait_id: portrait.id, face: portrait.face, sample_rate: session.context.sampleRate, consent: true,
    video: "jpeg", ...emotionNow(),
  }));
  session.socket.addEventListener("message", ({ data }) => {
    if (live === session) (typeof data === "string" ? hear : receive)(session, data, source);
  });
  session.socket.addEventListener("close", () => { if (live === session) end($("problem-live").textContent || "The connection to the server ended."); });
  return paint(session);
}

function hear(session, data, source) {
  const message = JSON.parse(data);
  if (message.type === "started") {
    Object.assign(session, { fps: message.fps, sampleRate: message.sample_rate });
    Object.assign($("live-view"), { width: message.width, height: message.height });
    const microphone = new AudioWorkletNode(session.context, "microphone", { numberOfOutputs: 0 });
    microphone.port.onmessage = ({ data: block }) => {
      if (session.socket.readyState === WebSocket.OPEN) session.socket.send(block);
    };
    source.connect(microphone);
    $("live-state").textContent = STATES.idle;
  }
  if (message.type === "state") $("live-state").textContent = STATES[message.state] ?? message.state;
  if (message.type === "fps") session.fps = message.fps;
  // A refused command does not end the session; what ends it closes the connection.
  if (message.type === "error") fail("live", new Problem(message));
}

/** Binary message: kind, time, picture or sound. */
function receive(session, data) {
  const view = new DataView(data);
  const time = view.getFloat64(1, true);
  const now = session.context.currentTime;
  session.base ??= now + DELAY - time;
  // Messages that come late move the clock instead of being shown in a hurry.
  if (session.base + time < now) session.base = now + DELAY - time;
  if (view.getUint8(0) === 1) {
    const picture = createImageBitmap(new Blob([data.slice(9)], { type: "image/jpeg" }));
    session.queue.push({ time, picture });
  } else if ($("live-sound").checked) {
    const samples = new Int16Array(data.slice(9));
    const buffer = session.context.createBuffer(1, samples.length, session.sampleRate);
    buffer.getChannelData(0).set(Float32Array.from(samples, (value) => value / 32768));
    const player = new AudioBufferSourceNode(session.context, { buffer });
    player.connect(session.context.destination);
    player.start(session.base + time);
  }
}

/** Draw the newest picture whose time has come; older ones are dropped. */
async function paint(session) {
  if (live !== session) return;
  requestAnimationFrame(() => paint(session));
  let due = null;
  while (session.queue.length && session.base + session.queue[0].time <= session.context.currentTime) due = session.queue.shift();
  if (!due) return;
  const picture = await due.picture;
  $("live-view").getContext("2d").drawImage(picture, 0, 0, $("live-view").width, $("live-view").height);
  picture.close();
  session.shown += 1;
  $("live-view").dataset.frames = session.shown;
  if (session.shown === 1 || session.shown % 25 === 0) $("live-note").textContent = `${session.fps} fps`;
}

/** Leave the session; `reason` is said next to the buttons. */
export function end(reason) {
  const session = live;
  if (!session) return;
  tell({ type: "stop" });
  live = null;
  session.socket.close();
  session.stopMeter();
  release(session.stream);
  session.context.close();
  show("live-start");
  show("live-stop", false);
  show("live-level", false);
  $("live-state").textContent = "Stopped";
  if (reason) fail("live", reason);
}
