"""An OpenAI-compatible endpoint: its address, what a request asks for, how fast it is asked."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from settings import Settings


class Endpoint(Settings):
    """A served chat model, and how fast and often it is asked.

    The API key is read from the environment when something is asked and stands in no setting,
    log or record. A redirect is not followed, since it could lead the questions elsewhere.

    Attributes:
        base_url: Address up to what "/chat/completions" follows, e.g. "https://api.openai.com/v1".
        remote_model: The model's name there.
        api_key_env: Environment variable that holds the API key; None where none is needed.
        temperature: Sampling temperature; None leaves it to the endpoint.
        max_tokens: Length limit of a reply in tokens; likewise.
        seed: Sampling seed, for endpoints that know one; likewise.
        extra_body: Further fields of the request, e.g. {max_completion_tokens: 2048}.
        timeout: Seconds that one attempt may take as a whole.
        max_retries: How often a request is sent again after a timeout, a lost connection or a
            status 408, 409, 429 or 5xx: after a pause that grows to 8 s, or the one that its header
            Retry-After asks for, if that is no longer than two minutes. A request that is to wait
            longer isn't sent again and counts as failed.
        concurrency: Requests under way at a time.
        requests_per_minute: Upper limit of requests sent, those sent again included, or None.
        give_up_after: How many requests may fail or be refused in a row before no more are sent.
    """

    base_url: str = "http://127.0.0.1:8000/v1"
    remote_model: str = Field(min_length=1)
    api_key_env: str | None = None
    temperature: float | None = Field(default=0.0, ge=0.0)
    max_tokens: int | None = Field(default=1024, ge=1)
    seed: int | None = 0
    extra_body: dict[str, Any] = Field(default_factory=dict)
    timeout: float = Field(default=60.0, gt=0.0)
    max_retries: int = Field(default=5, ge=0)
    concurrency: int = Field(default=8, ge=1)
    requests_per_minute: float | None = Field(default=None, gt=0.0)
    give_up_after: int = Field(default=20, ge=1)

    @field_validator("base_url")
    @classmethod
    def _is_plain_address(cls, url: str) -> str:
        # Messages don't repeat the address, which may hold a password or a key.
        try:
            parts = urlsplit(url)
            is_web = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_web = is_web and parts.port != 0 and not re.search(r"\s", url)
        except ValueError:
            is_web = False
        if not is_web:
            raise ValueError("this is no web address; write it as in https://api.openai.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "this address holds a user, a password, a query or a fragment; leave them out, "
                "and name the variable that holds the API key in api_key_env"
            )
        url = url.rstrip("/")
        if url.endswith("/chat/completions"):
            raise ValueError('leave "/chat/completions" out; it is added to the address')
        return url

    @field_validator("api_key_env")
    @classmethod
    def _is_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(
                "this is no name of an environment variable; put the API key into one such as "
                "OPENAI_API_KEY and write that name here, never the key"
            )
        return name

    @field_validator("extra_body")
    @classmethod
    def _is_further(cls, extra: dict[str, Any]) -> dict[str, Any]:
        own = {"model", "messages", "temperature", "max_tokens", "seed", "stream", "n"}
        if taken := sorted(own & set(extra)):
            raise ValueError(f"{', '.join(taken)} can't be set here; use the setting of that name")
        return extra

    @property
    def api_key(self) -> str:
        """ "" where none is needed."""
        return os.environ.get(self.api_key_env or "", "")

    def asked(self) -> dict[str, Any]:
        """Who is asked, and every field of the request but the messages."""
        return {"base_url": self.base_url, "body": self.body()}

    def body(self) -> dict[str, Any]:
        """The request's fields besides the messages; those left to the endpoint are missing."""
        chosen = {
            "model": self.remote_model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        fields = {key: value for key, value in chosen.items() if value is not None}
        return {**fields, **self.extra_body}
