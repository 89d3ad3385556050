// Waveform above, spectrogram below, on one canvas.

const SIZE = 512; // window length in samples
const BINS = 170; // frequencies shown: up to 8 kHz, above which speech has little power
const WAVE = 0.35; // share of the height for the waveform

export function drawPlot(canvas, samples) {
  const paper = canvas.getContext("2d");
  const { width, height } = canvas;
  const waveHeight = Math.round(height * WAVE);
  paper.clearRect(0, 0, width, height);
  paper.fillStyle = getComputedStyle(canvas).color;
  drawWave(paper, samples, width, waveHeight);
  drawSpectrogram(paper, samples, width, height - waveHeight, waveHeight);
}

function drawWave(paper, samples, width, height) {
  const loudest = samples.reduce((most, s) => Math.max(most, Math.abs(s)), 1e-3);
  for (let x = 0; x < width; x++) {
    let most = 0;
    const end = Math.floor(((x + 1) * samples.length) / width);
    for (let i = Math.floor((x * samples.length) / width); i < end; i++) {
      most = Math.max(most, Math.abs(samples[i]));
    }
    const tall = Math.max(1, (most / loudest) * (height - 8));
    paper.fillRect(x, (height - tall) / 2, 1, tall);
  }
}

function drawSpectrogram(paper, samples, width, height, top) {
  const image = paper.createImageData(width, height);
  const window = Float32Array.from({ length: SIZE }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / SIZE));
  for (let x = 0; x < width; x += 2) {
    const begin = Math.round((x / width) * Math.max(0, samples.length - SIZE));
    const power = spectrum(window.map((w, i) => w * (samples[begin + i] ?? 0)));
    for (let y = 0; y < height; y++) {
      const bin = Math.floor(((height - 1 - y) / height) * BINS);
      // a range of 70 dB, from black to bright
      const level = Math.min(1, Math.max(0, (10 * Math.log10(power[bin] + 1e-9) + 45) / 70));
      const colour = [255 * level ** 1.2, 190 * level ** 2, 30 + 130 * level * (1 - level), 255];
      image.data.set([...colour, ...colour], (y * width + x) * 4); // every second column is copied: half the work
    }
  }
  paper.putImageData(image, 0, top);
}

// Power of each frequency, by a radix-2 FFT in place.
function spectrum(real) {
  const imaginary = new Float32Array(SIZE);
  for (let i = 1, j = 0; i < SIZE; i++) {
    let bit = SIZE >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [real[i], real[j]] = [real[j], real[i]];
  }
  for (let length = 2; length <= SIZE; length *= 2) {
    for (let start = 0; start < SIZE; start += length) {
      for (let k = 0; k < length / 2; k++) {
        const angle = (-2 * Math.PI * k) / length;
        const [c, s] = [Math.cos(angle), Math.sin(angle)];
        const [low, high] = [start + k, start + k + length / 2];
        const re = real[high] * c - imaginary[high] * s;
        const im = real[high] * s + imaginary[high] * c;
        [real[high], imaginary[high]] = [real[low] - re, imaginary[low] - im];
        [real[low], imaginary[low]] = [real[low] + re, imaginary[low] + im];
      }
    }
  }
  return real.map((re, i) => re * re + imaginary[i] * imaginary[i]);
}
