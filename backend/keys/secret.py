"""The form of a key: `sk-`, a public part of 8, a secret of 40 and a checksum of 6 base62 signs.

The checksum lets a mistyped key be refused without a look into the database and lets a scanner
tell a leaked key from noise.
"""

import hashlib
import re
import secrets
import string
import zlib
from dataclasses import dataclass

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_PUBLIC, _SECRET, _CHECK = 8, 40, 6
_FORM = re.compile(rf"sk-[0-9A-Za-z]{{{_PUBLIC + _SECRET + _CHECK}}}")


@dataclass(frozen=True)
class NewKey:
    key: str
    hash: str
    prefix: str
    last4: str


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECK)


def make() -> NewKey:
    body = "".join(secrets.choice(_BASE62) for _ in range(_PUBLIC + _SECRET))
    key = f"sk-{body}{_checksum(body)}"
    return NewKey(key, digest(key), key[: 3 + _PUBLIC], key[-4:])


def is_well_formed(key: str) -> bool:
    body, check = key[3:-_CHECK], key[-_CHECK:]
    return _FORM.fullmatch(key) is not None and secrets.compare_digest(_checksum(body), check)


def digest(key: str) -> str:
    """SHA-256: with 238 random bits in the key a slow hash would protect nothing more."""
    return hashlib.sha256(key.encode()).hexdigest()
