"""What several test modules share: clusters, tiny models, data sets, golden numbers."""
