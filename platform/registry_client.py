"""Requests to the model registry, bounded in time. A missing model and an outage are two errors.

A registry that answers "there is no such model" is a MissingModelError. One that refuses the
connection, refuses access, fails or answers something else is a RegistryUnavailableError.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from valle.platform import settings
from valle.platform.credentials import strip_credentials

REQUEST_SECONDS, REQUEST_RETRIES = 5, 1
"""Bounds of a look-up, unless the user's environment sets MLflow's own: it answers or fails within
a few seconds, where MLflow would try for four minutes."""


class MissingModelError(FileNotFoundError):
    """The registry answered: it has no such model, version or alias."""


class RegistryUnavailableError(ConnectionError):
    """The registry did not answer, so it is not known whether it has the model."""


def is_missing(error: Exception) -> bool:
    """True for MLflow's error about a model, version or alias that does not exist."""
    code = getattr(error, "error_code", "")
    # a missing alias is an invalid parameter to MLflow's SQL store
    return code == "RESOURCE_DOES_NOT_EXIST" or (
        code == "INVALID_PARAMETER_VALUE" and "not found" in str(error).lower()
    )


def is_missing_database(address: str) -> bool:
    """True for a local sqlite store that does not exist yet. Opening it would create it."""
    path = address.removeprefix("sqlite:///")
    return path != address and not Path(path).exists()


@contextmanager
def registry_client(
    address: str, subject: str = "such model", *, bounded: bool = True
) -> Iterator[Any]:
    """An `MlflowClient` for the registry at `address`, which needs no right to write.

    Raises MissingModelError ("the registry at ... has no {subject}") and RegistryUnavailableError
    for errors inside the block, which names no experiment and changes no global setting.
    `bounded=False` waits as long as MLflow does, for uploads and downloads.
    """
    import mlflow
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    shown = strip_credentials(address)
    limits = (
        settings.bounded_mlflow_requests(REQUEST_SECONDS, REQUEST_RETRIES)
        if bounded
        else nullcontext()
    )
    try:
        with limits:
            yield mlflow.MlflowClient(tracking_uri=address, registry_uri=address)
    except (FileNotFoundError, RegistryUnavailableError):
        raise
    except (MlflowException, requests.RequestException, SQLAlchemyError, OSError) as error:
        reason = strip_credentials(str(error))
        if isinstance(error, MlflowException) and is_missing(error):
            raise MissingModelError(
                f"the registry at {shown} has no {subject} ({reason})"
            ) from error
        raise RegistryUnavailableError(
            f"the registry at {shown} did not answer: {reason[:500]}"
        ) from error
