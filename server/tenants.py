"""Tenants: the clients whose prefixes and stored responses are kept apart, and the API keys that name them.

A request's tenant is the name of its API key, else the value of the header that `--tenant-header` names, else a hash of
its key; without keys and without a header, all requests are of one tenant, "".
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Annotated

import msgspec
from msgspec import Meta

SALT_SIZE = 16
"""Bytes of a prefix salt."""
MAX_TENANT_LENGTH = 128
"""Characters of a tenant's name in a header."""

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})=(?=.*[^=])(.+)")
"""NAME=KEY. A "=" at the end is base64's filling, and belongs to a key without a name."""


class KeyLimits(msgspec.Struct, frozen=True):
    """What the tenant of a key may use; 0: as much as it likes."""

    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    """Its share of the engine, relative to the others'."""
    max_sequences: Annotated[int, Meta(ge=0)] = 0
    """Sequences in flight."""
    requests_per_minute: Annotated[float, Meta(ge=0)] = 0.0
    tokens_per_minute: Annotated[float, Meta(ge=0)] = 0.0
    """Tokens of prompts and answers."""


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that clients may send, with the name that the operator gave it, if any, and its limits."""

    key: str
    name: str | None = None
    limits: KeyLimits = NO_LIMITS

    @property
    def digest(self) -> str:
        """The tenant of a key without a name: 64 bits of its hash, which do not change with the order of keys."""
        return f"key:{sha256(self.key.encode()).hexdigest()[:16]}"

    def matches(self, given: bytes) -> bool:
        """Compare in constant time, whatever the lengths are: the hash of what was given with that of the key."""
        return hmac.compare_digest(given, sha256(self.key.encode()).digest())


def parse_key(text: str) -> ApiKey:
    """Read KEY or NAME=KEY, where NAME is up to 64 letters, digits and `._-`."""
    if (match := _NAMED.fullmatch(text)) is None:
        return ApiKey(text)
    return ApiKey(match[2], match[1])


def find_key(keys: Iterable[ApiKey], given: bytes) -> ApiKey | None:
    """Return the key that a client sent. All are compared, whichever matches, so that timing reveals nothing."""
    digest = sha256(given).digest()
    found = [key for key in keys if key.matches(digest)]
    return found[0] if found else None


def tenant_of(key: ApiKey | None, header: str | None) -> str:
    """Return the tenant of a request with this key, if keys are needed, and this tenant header, if it is configured."""
    if key is not None and key.name is not None:
        return key.name
    if header is not None:
        return f"header:{header}"
    return "" if key is None else key.digest


def prefix_salt(tenant: str, cache_salt: str | None) -> bytes:
    """Return the salt of the prefix cache's digests: requests find each other's prefixes only if theirs are equal.
    `cache_salt` is the client's own; b"" without it and without a tenant."""
    if not tenant and not cache_salt:
        return b""
    own = (cache_salt or "").encode("utf-8", "surrogatepass")
    return blake2b(b"%d:%b%b" % (len(tenant), tenant.encode(), own), digest_size=SALT_SIZE).digest()
