"""The configuration that ships, deployed on a cluster: closed, and with limits for all replicas."""

import hashlib
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from helpers import clusters
from helpers.endpoints import SharedEndpoint

from valle.jobs.publish import PublishRecipe, publish
from valle.platform import settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.ray
def test_serve_run_starts_the_application(
    shared_endpoint: SharedEndpoint, publish_recipe: PublishRecipe, home: Path
) -> None:
    """`serve run valle.serve.app:build_app`, with the configuration that ships, on a cluster."""
    shared_endpoint.close()  # the command starts Serve on its own port
    publish(publish_recipe)
    port = clusters.free_port()
    content = yaml.safe_load((ROOT / "serve/config.yaml").read_text())
    content["http_options"] |= {"host": "127.0.0.1", "port": port}
    content["applications"][0]["args"] |= {
        "voices": str(home / "voices"), "tracking_uri": settings.read().tracking_uri,
        "max_replicas": 1, "api_keys": str(home / "keys.yaml"),
    }  # fmt: skip
    digest = hashlib.sha256(b"secret").hexdigest()
    (home / "keys.yaml").write_text(f"[{{name: web, sha256: '{digest}', requests_per_minute: 3}}]")
    config = home / "serve.yaml"
    config.write_text(yaml.safe_dump(content))
    serve_command = Path(sys.executable).parent / "serve"
    address = ray.get_runtime_context().gcs_address
    command = [str(serve_command), "run", f"--address={address}", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        clusters.wait_for(lambda: clusters.responds(f"{url}/health/live"), 120, "the endpoint")
        body = {"input": "hello", "voice": "ann"}
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.post("/v1/audio/speech", json=body).status_code == 401
            client.headers["Authorization"] = "Bearer secret"
            statuses = [client.post("/v1/audio/speech", json=body).status_code for _ in range(4)]
            assert statuses == [200, 200, 200, 429]
            metrics = client.get("/metrics").text
            assert "valle_unauthorized_requests_total" in metrics
    finally:
        process.terminate()
        process.wait(timeout=60)
        shared_endpoint.close()  # it leaves Serve running
