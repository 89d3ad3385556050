// The page: one form that speaks, one list of voices.

import { addVoice, deleteVoice, listVoices, RATE, speak } from "./api.js";
import { draw } from "./picture.js";
import { decode, join, Player, record, toWav } from "./sound.js";

const $ = (id) => document.getElementById(id);
const key = () => $("key").value.trim();

let player = null;
let running = null; // the AbortController of the request that is being answered
let pieces = []; // what has been heard so far
let heard = 0; // samples in it
let painted = 0; // samples in the picture

function show(error) {
  $("error").hidden = !error;
  $("error").textContent = error?.message ?? "";
}

// Runs what a control is for and shows what goes wrong in it.
const attempt = (action) => async (event) => {
  event?.preventDefault();
  show(null);
  try {
    await action(event);
  } catch (error) {
    if (error.name !== "AbortError") show(error);
  }
};

async function showVoices(chosen = $("voice").value) {
  const names = await listVoices(key());
  $("voice").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  $("voices").replaceChildren(...names.map(line));
  if (!names.length) $("voices").textContent = "None yet: add a recording below.";
}

function line(name) {
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

async function say() {
  stop();
  const mine = (running = new AbortController());
  player = new Player(quiet);
  const started = performance.now();
  const since = () => (performance.now() - started) / 1000;
  begin();
  try {
    const headers = await speak(request(), key(), mine.signal, (samples) => {
      if (!pieces.length) $("first").textContent = `${since().toFixed(2)} s`;
      player.add(samples);
      hear(samples, since());
    });
    $("model").textContent = headers.get("x-model")?.replace("models:/", "") ?? "–";
  } finally {
    if (running === mine) end();
  }
}

function begin() {
  pieces = [];
  heard = painted = 0;
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
  $("result").hidden = !heard;
  if (!player.sources.size) quiet();
  if (!heard) return;
  paint();
  $("again").disabled = false;
  $("download").href = URL.createObjectURL(toWav(join(pieces)));
  $("download").hidden = false;
}

function quiet() {
  $("stop").hidden = running === null;
}

function stop() {
  running?.abort();
  player?.close();
}

function hear(samples, taken) {
  if (!pieces.length) requestAnimationFrame(paint);
  pieces.push(samples);
  heard += samples.length;
  const length = heard / RATE;
  $("duration").textContent = `${length.toFixed(2)} s`;
  $("factor").textContent = (taken / (length * Number($("speed").value))).toFixed(2);
}

// At most once for each frame of the screen, however fast sound comes.
function paint() {
  if (painted !== heard) draw($("picture"), join(pieces));
  painted = heard;
  if (running) requestAnimationFrame(paint);
}

function again() {
  player?.close();
  player = new Player(quiet);
  player.add(join(pieces));
  $("stop").hidden = false;
}

let recorder = null;
let recorded = null; // a Blob, until a file is chosen instead

async function toggleRecording() {
  if (recorder) {
    recorded = await recorder.stop();
    recorder = null;
    $("recording").value = "";
    $("heard").textContent = `Recorded ${((await decode(recorded)).length / RATE).toFixed(1)} s.`;
  } else {
    recorder = await record();
    $("heard").textContent = "Recording: say a few sentences, then press again.";
  }
  $("record").setAttribute("aria-pressed", String(recorder !== null));
  $("record").textContent = recorder ? "Stop recording" : "Record";
}

async function add() {
  const file = $("recording").files[0] ?? recorded;
  if (!file) throw new Error("choose a recording, or record one");
  const name = $("name").value;
  const voice = await addVoice(name, toWav(await decode(file)), $("consent").value, key());
  $("add").reset();
  recorded = null;
  $("heard").textContent = `${name} is here: ${voice.seconds.toFixed(1)} s of sound.`;
  await showVoices(name);
}

$("ask").onsubmit = attempt(say);
$("stop").onclick = stop;
$("again").onclick = attempt(again);
$("record").onclick = attempt(toggleRecording);
$("recording").onchange = () => (recorded = null);
$("add").onsubmit = attempt(add);
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").onchange = attempt(async () => {
  sessionStorage.setItem("key", key());
  await showVoices();
});
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
};
attempt(showVoices)().then(() => document.body.setAttribute("data-ready", ""));
