"""Settings of backend and index worker: one validated object, read from LECTERN_* variables."""

import re
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Annotated

from pydantic import AnyHttpUrl, Field, SecretStr, TypeAdapter, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from backend.errors import StartupError

MEBIBYTE = 1024 * 1024
_HTTP_URL = TypeAdapter(AnyHttpUrl)
_CLASS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", re.ASCII)

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """Every value can be set by the environment variable LECTERN_<NAME>."""

    model_config = SettingsConfigDict(
        env_prefix="LECTERN_", env_ignore_empty=True, extra="ignore", frozen=True
    )

    home: Path = Field(
        default_factory=lambda: Path.home() / ".lectern",
        description="State directory: database, documents, indexes.",
    )
    database_url: SecretStr | None = Field(
        default=None, description="SQLAlchemy URL; SQLite in the home when unset."
    )
    upstream_url: str = Field(
        default="http://127.0.0.1:8100", description="OpenAI-style model server, without /v1."
    )
    upstream_key: SecretStr | None = Field(
        default=None, description="Bearer key for the model server."
    )
    upstream_key_file: Path | None = Field(
        default=None, description="File that holds the bearer key for the model server."
    )
    embedder: str | None = Field(
        default=None, description="Sentence-transformers name or folder; the packaged one if unset."
    )
    glossary: Path | None = Field(
        default=None, description="Extra Chinese-English glossary file for retrieval."
    )

    trusted_networks: str = Field(
        default="127.0.0.0/8,::1/128",
        description="Where our own web server and Prometheus run: their X-Forwarded-For counts, "
        "and /metrics answers them.",
    )
    session_hours: Positive = Field(default=168, description="Life of a login.")
    daily_tokens: Positive = Field(
        default=2_000_000,
        description="Tokens a user may spend in one UTC day, page and keys alike.",
    )
    requests_per_minute: Positive = Field(
        default=6_000, description="Gateway requests a user may make in one minute."
    )
    key_classes: str = Field(
        default="standard,interactive,batch",
        description="Classes of service that a key may have, those of the engine's --slo-class "
        "included.",
    )
    max_upload_bytes: Positive = Field(
        default=50 * MEBIBYTE, description="Largest document that can be uploaded."
    )
    max_request_bytes: Positive = Field(
        default=4 * MEBIBYTE, description="Largest JSON body, gateway included."
    )
    context_tokens: Positive = Field(
        default=4096, description="Context length assumed when the model server names none."
    )
    answer_tokens: Positive = Field(default=512, description="Longest answer on the page.")
    passages: Positive = Field(default=8, description="Passages searched for each question.")
    upstream_timeout: Seconds = Field(
        default=600.0, description="Longest silence of the model server before a call is given up."
    )
    argon2_memory_kib: Positive = Field(default=65_536, description="Memory of one password hash.")
    argon2_rounds: Positive = Field(default=3, description="Passes of one password hash.")
    parse_seconds: Seconds = Field(default=120.0, description="Time limit for one document.")
    parse_bytes: Positive = Field(
        default=2048 * MEBIBYTE, description="Address space allowed for reading one document."
    )
    job_lease_seconds: Seconds = Field(
        default=30.0, description="A job whose worker is silent for this long is taken by another."
    )
    job_attempts: Positive = Field(
        default=3, description="Times a job is begun before it counts as failed."
    )

    @field_validator("upstream_url")
    @classmethod
    def _upstream_is_http(cls, value: str) -> str:
        _HTTP_URL.validate_python(value)
        return value.rstrip("/").removesuffix("/v1")

    @field_validator("trusted_networks")
    @classmethod
    def _networks(cls, value: str) -> str:
        for part in value.split(","):
            ip_network(part.strip())
        return value

    @field_validator("key_classes")
    @classmethod
    def _class_names(cls, value: str) -> str:
        for name in value.split(","):
            if not _CLASS_NAME.fullmatch(name.strip()):
                raise ValueError(f"{name!r} is not the name of a class")
        return value

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.key_classes.split(","))

    def trusts(self, host: str) -> bool:
        """Whether `host`, the address of a peer, is one of ours."""
        try:
            address = ip_address(host)
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return any(address in ip_network(part.strip()) for part in self.trusted_networks.split(","))

    @property
    def database(self) -> str:
        """SQLAlchemy URL with the psycopg driver filled in for PostgreSQL."""
        if self.database_url is None:
            return f"sqlite:///{self.home / 'lectern.db'}"
        url = self.database_url.get_secret_value()
        for prefix in ("postgresql://", "postgres://"):
            if url.startswith(prefix):
                return "postgresql+psycopg://" + url.removeprefix(prefix)
        return url

    @property
    def documents_dir(self) -> Path:
        return self.home / "documents"

    @property
    def index_dir(self) -> Path:
        return self.home / "index"

    @property
    def initial_login(self) -> Path:
        return self.home / "initial-login"

    def read_upstream_key(self) -> str | None:
        """The key from the file when one is named, else from the environment."""
        if self.upstream_key_file is not None:
            try:
                return self.upstream_key_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise StartupError(
                    f"LECTERN_UPSTREAM_KEY_FILE ({self.upstream_key_file}) cannot be read: "
                    f"{error.strerror}. Name a readable file or unset it."
                ) from error
        return self.upstream_key.get_secret_value() if self.upstream_key else None


def load_settings() -> Settings:
    """Read the environment; raises StartupError with one sentence that names the variable."""
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = "LECTERN_" + "_".join(str(part) for part in first["loc"]).upper()
        raise StartupError(f"{name} is not valid: {first['msg']}.") from error
    return settings.model_copy(update={"home": settings.home.expanduser().absolute()})
