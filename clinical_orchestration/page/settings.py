"""Settings of the page process, read when called."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class PageSettings(BaseSettings):
    """Where the page finds the instance, and who may reach it."""

    model_config = SettingsConfigDict(env_prefix="", extra="ignore", populate_by_name=True)

    dagster_home: str = Field("", alias="DAGSTER_HOME", description="Folder of dagster.yaml and workspace.yaml.")
    postgres_url: SecretStr = Field(SecretStr(""), alias="POSTGRES_URL", description="Database of the instance.")
    clinical_home: str = Field("", alias="CLINICAL_HOME", description="Folder of the embedded stack, where one runs.")
    mlflow_url: str = Field("http://127.0.0.1:5000", alias="MLFLOW_TRACKING_URI")
    serving_url: str = Field("http://127.0.0.1:8000", alias="SERVING_URL")
    allow_remote: bool = Field(
        False, alias="CLINICAL_PAGE_ALLOW_REMOTE", description="True lets the page listen on other than loopback."
    )
    service_token: SecretStr = Field(
        SecretStr(""), alias="CLINICAL_SERVICE_TOKEN", description="Bearer token of the stack itself."
    )
    admin_password: SecretStr = Field(
        SecretStr(""), alias="CLINICAL_ADMIN_PASSWORD", description="Password of the first user, admin."
    )
    allowed_hosts: str = Field(
        "", alias="CLINICAL_PAGE_ALLOWED_HOSTS", description="Host names, comma-separated, that requests may name too."
    )

    @property
    def workspace_file(self) -> Path:
        """The ``workspace.yaml`` that names the code locations."""
        return Path(self.dagster_home) / "workspace.yaml"

    @property
    def status_file(self) -> Path | None:
        """Where the supervisor of an embedded stack writes what it last saw; None without one."""
        return Path(self.clinical_home) / "run" / "status.json" if self.clinical_home else None

    @property
    def host_names(self) -> frozenset[str]:
        """Names under which the page answers; others are refused, so that no foreign site can rebind its name."""
        return frozenset(
            {*LOOPBACK_NAMES, *(name.strip().lower() for name in self.allowed_hosts.split(",") if name.strip())}
        )


def is_loopback(host: str) -> bool:
    """Say whether `host` is reachable from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
