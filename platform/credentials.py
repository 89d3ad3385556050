"""Credentials inside addresses, such as `s3://KEY:SECRET@bucket` and `http://user:password@host`.

Addresses of data are stored with datasets, checkpoints and bundles, and shown in messages: one with
credentials is refused. Those of a registry may hold a password (`postgresql://user:password@host`),
and are stripped before they are shown.
"""

import re

# A secret of S3 may hold slashes. A key after the bucket may hold `:` and `@`, which are none.
_S3 = re.compile(r"(?<![A-Za-z0-9])(s3a?://)[^/@\s:]*:[^@\s]+@", re.IGNORECASE)
_USER = re.compile(r"(?<![A-Za-z0-9])([a-z][a-z0-9+.-]*://)[^/@\s?#]+@", re.IGNORECASE)
_SIGNATURE = re.compile(
    r"([?&](?:X-Amz-(?:Signature|Credential|Security-Token)|sig|signature|AWSAccessKeyId|"
    r"access_key|secret_key|token)=)[^&\s'\"]+",
    re.IGNORECASE,
)


def strip_credentials(text: str) -> str:
    """`text` with `***` in place of the credentials of every address in it."""
    text = _S3.sub(r"\1***@", text)
    text = _USER.sub(r"\1***@", text)
    return _SIGNATURE.sub(r"\1***", text)


def refuse_credentials(uri: str) -> None:
    """Raises ValueError, without the secret, for an address that holds credentials."""
    if (shown := strip_credentials(uri)) != uri:
        raise ValueError(
            f"{shown}: an address must not hold credentials, which would be stored with the data; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role or profile"
        )
