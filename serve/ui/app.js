// The page: the speech form and the list of voices.

import { addVoice, deleteVoice, listVoices, RATE, speak } from "./api.js";
import { drawPlot } from "./plot.js";
import { decode, join, Player, record, toWav } from "./audio.js";

const $ = (id) => document.getElementById(id);
const key = () => $("key").value.trim();

let player = null;
let running = null; // AbortController of the request in progress
let chunks = []; // audio received so far
let receivedSamples = 0; // samples in `chunks`
let plottedSamples = 0; // samples in the plot

function show(error) {
  $("error").hidden = !error;
  $("error").textContent = error?.message ?? "";
}

// Event handler of a control: runs the action and shows its error.
const attempt = (action) => async (event) => {
  event?.preventDefault();
  show(null);
  try {
    await action(event);
  } catch (error) {
    if (error.name !== "AbortError") show(error);
  }
};

async function showVoices(selected = $("voice").value) {
  const names = await listVoices(key());
  $("voice").replaceChildren(...names.map((name) => new Option(name, name, false, name === selected)));
  $("voices").replaceChildren(...names.map(voiceItem));
  if (!names.length) $("voices").textContent = "None yet: add a recording below.";
}

function voiceItem(name) {
  const item = document.createElement("li");
  const remove = document.createElement("button");
  remove.type = "button";
  remove.textContent = "Delete";
  remove.setAttribute("aria-label", `Delete voice ${name}`);
  remove.onclick = attempt(async () => {
    if (!confirm(`Delete the voice ${name}? Its recording is removed from the server.`)) return;
    await deleteVoice(name, key());
    await showVoices();
  });
  item.append(name, remove);
  return item;
}

function request() {
  return {
    input: $("text").value,
    voice: $("voice").value,
    speed: Number($("speed").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
    language: $("language").value,
    chunked: $("chunked").checked,
  };
}

async function submit() {
  stop();
  const controller = (running = new AbortController());
  player = new Player(onIdle);
  const startTime = performance.now();
  const since = () => (performance.now() - startTime) / 1000;
  begin();
  try {
    const headers = await speak(request(), key(), controller.signal, (samples) => {
      if (!chunks.length) $("first").textContent = `${since().toFixed(2)} s`;
      player.add(samples);
      receive(samples, since());
    });
    $("model").textContent = headers.get("x-model")?.replace("models:/", "") ?? "–";
  } finally {
    if (running === controller) end(); // else another request has replaced this one
  }
}

function begin() {
  chunks = [];
  receivedSamples = plottedSamples = 0;
  for (const id of ["first", "duration", "factor", "model"]) $(id).textContent = "…";
  if ($("download").href) URL.revokeObjectURL($("download").href);
  $("download").hidden = $("again").disabled = true;
  $("stop").hidden = $("result").hidden = false;
  $("speak").textContent = "Speaking …";
  $("result").setAttribute("aria-busy", "true");
}

function end() {
  running = null;
  $("speak").textContent = "Speak";
  $("result").setAttribute("aria-busy", "false");
  $("result").hidden = !receivedSamples;
  if (!player.sources.size) onIdle();
  if (!receivedSamples) return;
  paint();
  $("again").disabled = false;
  $("download").href = URL.createObjectURL(toWav(join(chunks)));
  $("download").hidden = false;
}

function onIdle() {
  $("stop").hidden = running === null;
}

function stop() {
  running?.abort();
  player?.close();
}

function receive(samples, seconds) {
  if (!chunks.length) requestAnimationFrame(paint);
  chunks.push(samples);
  receivedSamples += samples.length;
  const length = receivedSamples / RATE;
  $("duration").textContent = `${length.toFixed(2)} s`;
  $("factor").textContent = (seconds / (length * Number($("speed").value))).toFixed(2);
}

// Redraws the plot at most once per screen frame, however fast audio arrives.
function paint() {
  if (plottedSamples !== receivedSamples) drawPlot($("plot"), join(chunks));
  plottedSamples = receivedSamples;
  if (running) requestAnimationFrame(paint);
}

function replay() {
  player?.close();
  player = new Player(onIdle);
  player.add(join(chunks));
  $("stop").hidden = false;
}

let recorder = null;
let recordedFile = null; // Blob from the microphone; a selected file replaces it

async function toggleRecording() {
  if (recorder) {
    recordedFile = await recorder.stop();
    recorder = null;
    $("recording").value = "";
    $("recording-status").textContent = `Recorded ${((await decode(recordedFile)).length / RATE).toFixed(1)} s.`;
  } else {
    recorder = await record();
    $("recording-status").textContent = "Recording: say a few sentences, then press again.";
  }
  $("record").setAttribute("aria-pressed", String(recorder !== null));
  $("record").textContent = recorder ? "Stop recording" : "Record";
}

async function add() {
  const file = $("recording").files[0] ?? recordedFile;
  if (!file) throw new Error("choose a recording, or record one");
  const name = $("name").value;
  const voice = await addVoice(name, toWav(await decode(file)), $("consent").value, key());
  $("add").reset();
  recordedFile = null;
  $("recording-status").textContent = `${name} is added: ${voice.seconds.toFixed(1)} s of speech.`;
  await showVoices(name);
}

$("speech-form").onsubmit = attempt(submit);
$("stop").onclick = stop;
$("again").onclick = attempt(replay);
$("record").onclick = attempt(toggleRecording);
$("recording").onchange = () => (recordedFile = null);
$("add").onsubmit = attempt(add);
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").onchange = attempt(async () => {
  sessionStorage.setItem("key", key());
  await showVoices();
});
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("speech-form").requestSubmit();
};
attempt(showVoices)().then(() => document.body.setAttribute("data-ready", ""));
