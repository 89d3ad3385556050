"""An S3 server for tests."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from botocore.config import Config

from helpers import clusters


@contextmanager
def running_bucket(folder: Path) -> Iterator[str]:
    """The URI of an empty bucket on a server of its own, which logs to `folder`."""
    import boto3

    port = clusters.free_port()
    with pytest.MonkeyPatch.context() as patch, (folder / "s3.log").open("w") as log:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log
        )
        try:
            client = boto3.client("s3", config=Config(retries={"max_attempts": 20}))
            client.create_bucket(Bucket="valle")
            yield "s3://valle"
        finally:
            server.terminate()
            server.wait()
