"""The rule against exposed endpoints: other machines need API keys, unless `open` is set.

`validate-config`, `valle serve` and the application itself apply this rule.
"""

import re
from collections.abc import Iterator

from valle.serve.app_args import AppArgs
from valle.serve.web.keys import read_keys
from valle.serve.web.origins import is_loopback

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/")


def exposure_error(host: str | None, args: AppArgs) -> str | None:
    """Why an application must not be served on `host` (None: no HTTP); None if it may be."""
    if host is None or is_loopback(host) or args.api_keys or args.open:
        return None
    return (
        f"api_keys: missing, and {host or 'every interface'} can be reached from other machines: "
        "everybody could add, use and delete voices. Make a key (`valle keys NAME`), put it into a "
        "file and set api_keys (`valle serve --api-keys FILE`); or listen on 127.0.0.1; or set "
        "open: true (`--open`) if everybody may"
    )


def refuse_exposure(host: str | None, args: AppArgs) -> None:
    """Raises ValueError where `exposure_error` has a reason."""
    if reason := exposure_error(host, args):
        raise ValueError(reason)


def key_file_error(args: AppArgs) -> str | None:
    """The error of the key file; None if no file is set, or if it can be used."""
    if not args.api_keys:
        return None
    try:
        read_keys(args.api_keys)
    except FileNotFoundError:
        return f"api_keys: there is no {args.api_keys}: make a key with `valle keys NAME`"
    except (ValueError, OSError) as error:
        return str(error)
    return None


def node_local_fields(args: AppArgs) -> Iterator[str]:
    """Names of the fields that hold paths of one machine. On several nodes, each replica would read
    the files of its own node, and a voice added on one node would be missing on the others."""
    paths = {"voices": args.voices, "api_keys": args.api_keys, "model": args.model}
    for name, value in paths.items():
        if value and (value.startswith("file:") or not _SCHEME.match(value)):
            yield f"{name}: {value} is a path of one machine; use s3:// or a folder all nodes share"
    uri = args.tracking_uri
    if uri is None or uri.startswith(("sqlite:", "file:")) or not _SCHEME.match(uri):
        where = uri or "unset, so MLFLOW_TRACKING_URI or sqlite in VALLE_HOME"
        yield f"tracking_uri: {where}; use the http address of an MLflow server"
