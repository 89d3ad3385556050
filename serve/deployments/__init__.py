"""AR, NAR and codec as Ray Serve deployments: batching, back-pressure, scaling, versions."""
