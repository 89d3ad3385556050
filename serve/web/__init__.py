"""The HTTP border: requests, voices, keys, audio formats, metrics."""
