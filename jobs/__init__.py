"""One file, one command: each job adapts a plain loop to Ray."""
