"""The method: text, codec, the two models, sampling and training. PyTorch only, no Ray, no MLflow."""
