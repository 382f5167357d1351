"""Settings of stores from the environment and the usual files, as obstore takes them.

obstore reads the variables of the environment by itself, and Google's login file; the files of the AWS command line it
does not read. A profile that logs in by other programs (SSO, roles) is not read here either: the message says how.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import ConfigError
from llmtrain.storage.address import Address


@dataclass(frozen=True)
class BucketSettings:
    """Service and credentials of a bucket."""

    endpoint: str
    """Address of the service, for messages."""
    options: Mapping[str, str]
    """Options of obstore beside those that it takes from the environment. They hold secrets."""


def s3_settings(place: Address) -> BucketSettings:
    """Return the settings of a bucket of S3. Raises ConfigError for a profile without keys."""
    environment = os.environ
    options: dict[str, str] = {}
    profile = _aws_profile(environment)
    by_itself = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    if not any(
        environment.get(name) for name in (*by_itself, "AWS_SKIP_SIGNATURE", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    ):
        options |= {name: profile[name] for name in _AWS_KEYS if name in profile}
        if environment.get("AWS_PROFILE") and "aws_access_key_id" not in options:
            raise ConfigError(
                f"{place.shown}: the profile {environment['AWS_PROFILE']} (AWS_PROFILE) has no aws_access_key_id in "
                '~/.aws: if it logs in by SSO or a role, run eval "$(aws configure export-credentials --format env)"'
            )
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or profile.get("region")
    if region:
        options["aws_region"] = region
    named = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    endpoint = next((environment[name] for name in named if environment.get(name)), profile.get("endpoint_url"))
    if endpoint:
        options["aws_endpoint"] = endpoint
    return BucketSettings(endpoint or "S3", options)


_AWS_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


def _aws_profile(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the profile that AWS_PROFILE names, or the default one; config first, credentials over it."""
    name = environment.get("AWS_PROFILE") or "default"
    found: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        path = Path(environment.get(variable) or file).expanduser()
        parser = configparser.RawConfigParser(default_section="")
        try:
            parser.read_string(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        except configparser.Error as error:
            raise ConfigError(
                f"{path} cannot be read: line {getattr(error, 'lineno', '?')} is no section or key"
            ) from None
        if parser.has_section(section):
            found |= dict(parser.items(section))
    return found


def google_settings(place: Address) -> BucketSettings:
    """Return the settings of a bucket of Google Cloud Storage."""
    endpoint = os.environ.get("GOOGLE_BASE_URL") or os.environ.get("STORAGE_EMULATOR_HOST") or ""
    return BucketSettings(endpoint or "Google Cloud Storage", {"google_base_url": endpoint} if endpoint else {})


def azure_settings(place: Address) -> BucketSettings:
    """Return the settings of a container of Azure. Raises ConfigError where the account is not named."""
    endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or ""
    if not endpoint and not any(
        os.environ.get(name) for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR")
    ):
        raise ConfigError(f"{place.shown}: the storage account is not named: set AZURE_STORAGE_ACCOUNT_NAME")
    return BucketSettings(endpoint or "Azure", {})
