"""Evaluation of voice models: items, systems, metrics, results, report, gate."""
