"""The AR engine: continuous batching of requests. Imports neither Ray nor FastAPI."""
