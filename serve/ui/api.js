// Client of the endpoint. An error response becomes an Error with the server's message.

export const RATE = 24000; // sample rate of `pcm`

async function fetchOk(path, options = {}, key = "") {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not an OpenAI error body, but a proxy's: show its status
  }
  throw new Error(message);
}

export async function listVoices(key) {
  const { voices } = await (await fetchOk("v1/audio/voices", {}, key)).json();
  return voices.map((voice) => voice.id);
}

export async function addVoice(name, wav, consent, key) {
  const body = new FormData();
  body.append("name", name);
  body.append("consent", consent);
  body.append("audio_sample", wav, "recording.wav");
  return (await fetchOk("v1/audio/voices", { method: "POST", body }, key)).json();
}

export async function deleteVoice(name, key) {
  await fetchOk(`v1/audio/voices/${encodeURIComponent(name)}`, { method: "DELETE" }, key);
}

// Calls `onSamples(Float32Array)` as audio arrives; resolves to the response's headers.
export async function speak(request, key, signal, onSamples) {
  const body = JSON.stringify({ ...request, response_format: "pcm" });
  const headers = { "Content-Type": "application/json" };
  const response = await fetchOk("v1/audio/speech", { method: "POST", body, headers, signal }, key);
  const reader = response.body.getReader();
  let odd = new Uint8Array(0); // first half of a sample that a chunk has cut
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return response.headers;
    const bytes = new Uint8Array(odd.length + value.length);
    bytes.set(odd);
    bytes.set(value, odd.length);
    const even = bytes.length - (bytes.length % 2);
    odd = bytes.slice(even);
    if (even) onSamples(Float32Array.from(new Int16Array(bytes.buffer, 0, even / 2), (s) => s / 32768));
  }
}
