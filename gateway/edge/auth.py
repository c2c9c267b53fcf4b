"""Which tenant calls? The API key in the metadata says so, never the body of a request."""

import hashlib
from collections.abc import Iterable

from gateway.config import AuthSection
from gateway.errors import Unauthenticated

_AUTHORIZATION = "authorization"
_API_KEY = "x-api-key"


class Authenticator:
    """Finds the tenant of an API key by its SHA-256.

    A dictionary lookup of the digest tells an attacker nothing by its time: without the key, the digest cannot be steered.
    Headers that were right are remembered (no more than there are keys and ways to write them); wrong ones never are.
    """

    def __init__(self, section: AuthSection) -> None:
        self._tenants = {bytes.fromhex(key.sha256): key.tenant for key in section.keys}
        self._anonymous = section.anonymous_tenant
        self._remembered: dict[tuple[str, str | bytes], str] = {}

    def tenant(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The tenant of a call with this metadata (names in lower case, as gRPC gives them).

        A key that is present must be valid: a wrong one never falls back to the anonymous tenant. Two keys must name one tenant.
        Raises Unauthenticated; its message never holds any part of a key.
        """
        found = ""
        for header in metadata:
            if header[0] not in (_AUTHORIZATION, _API_KEY):
                continue
            tenant = self._remembered.get(header) or self._look_up(*header)
            if found and tenant != found:
                raise Unauthenticated("the call carries API keys of different tenants")
            found = tenant
        if found:
            return found
        if self._anonymous:
            return self._anonymous
        raise Unauthenticated("an API key is needed: send 'authorization: Bearer KEY' or 'x-api-key: KEY'", reason="API_KEY_MISSING")

    def _look_up(self, name: str, value: str | bytes) -> str:
        key = _bearer(value) if name == _AUTHORIZATION else value
        raw = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
        tenant = self._tenants.get(hashlib.sha256(raw).digest())
        if tenant is None:
            raise Unauthenticated("the API key is not known")
        if len(self._remembered) < 4 * len(self._tenants):
            self._remembered[name, value] = tenant
        return tenant


def _bearer(value: str | bytes) -> str:
    if not isinstance(value, str):
        raise Unauthenticated("'authorization' must be 'Bearer KEY'")
    scheme, _, key = value.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("'authorization' must be 'Bearer KEY'")
    return key.strip()
