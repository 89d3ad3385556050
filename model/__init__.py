"""VALL-E in PyTorch: text, codecs, the AR and NAR models, sampling.

Imports no other folder of the project, neither Ray nor MLflow, and reads no environment variables.
"""
