"""The endpoint: Ray Serve deployments and the HTTP border."""
