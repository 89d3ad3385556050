"""The method: text, codec, the two models, sampling, training. Imports neither Ray nor MLflow."""
