"""What is measured of a model: items, metrics, figures with intervals, report, gate."""
