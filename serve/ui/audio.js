// Audio in the browser: streaming playback, recording, wav files.

import { RATE } from "./api.js";

// Plays chunks in order, without gaps as long as they arrive in time.
export class Player {
  constructor(onIdle) {
    this.onIdle = onIdle; // called whenever all chunks so far have been played
    this.context = new AudioContext({ sampleRate: RATE });
    this.next = 0; // start time of the next chunk
    this.sources = new Set();
  }

  add(samples) {
    const buffer = this.context.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    source.onended = () => {
      this.sources.delete(source);
      if (!this.sources.size) this.onIdle();
    };
    this.sources.add(source);
    // 30 ms ahead of the clock: scheduling takes time too
    this.next = Math.max(this.next, this.context.currentTime + 0.03);
    source.start(this.next);
    this.next += buffer.duration;
  }

  close() {
    for (const source of this.sources) source.stop();
    if (this.context.state !== "closed") this.context.close();
  }
}

export function join(chunks) {
  const samples = new Float32Array(chunks.reduce((sum, chunk) => sum + chunk.length, 0));
  let offset = 0;
  for (const chunk of chunks) {
    samples.set(chunk, offset);
    offset += chunk.length;
  }
  return samples;
}

// A 16-bit mono wav file.
export function toWav(samples) {
  const view = new DataView(new ArrayBuffer(44 + samples.length * 2));
  const write = (offset, text) =>
    [...text].forEach((c, i) => view.setUint8(offset + i, c.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, 36 + samples.length * 2, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // mono
  view.setUint32(24, RATE, true);
  view.setUint32(28, RATE * 2, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, samples.length * 2, true);
  samples.forEach((s, i) => view.setInt16(44 + i * 2, Math.max(-1, Math.min(1, s)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

// Decodes any file that the browser can play to mono samples at 24 kHz.
export async function decode(file) {
  const context = new OfflineAudioContext(1, 1, RATE);
  let decoded;
  try {
    decoded = await context.decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error("the browser cannot decode this file: choose another audio file");
  }
  const mono = new Float32Array(decoded.length);
  for (let channel = 0; channel < decoded.numberOfChannels; channel++) {
    decoded.getChannelData(channel).forEach((s, i) => (mono[i] += s / decoded.numberOfChannels));
  }
  return mono;
}

// Starts recording; `stop()` of the result ends it and resolves to a file.
export async function record() {
  if (!navigator.mediaDevices) throw new Error("recording needs https, or a server on localhost");
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const recorder = new MediaRecorder(stream);
  const parts = [];
  recorder.ondataavailable = (event) => parts.push(event.data);
  const ended = new Promise((resolve) => (recorder.onstop = resolve));
  recorder.start();
  return {
    async stop() {
      recorder.stop();
      await ended;
      stream.getTracks().forEach((track) => track.stop());
      return new Blob(parts, { type: recorder.mimeType });
    },
  };
}
