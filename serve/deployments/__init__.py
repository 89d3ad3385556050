"""AR, NAR and codec as Ray Serve deployments: batching, backpressure, scaling, versions."""
