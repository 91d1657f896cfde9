"""What our own engine is told of a call: whose it is and how soon its answer is wanted.

These X-Lectern headers are the platform's. All calls of a user, by whichever key or on the page,
have one tenant, so that they share one turn; the class is that of the key. Of the headers of a
client three are passed on: the name of its program, which the engine keeps apart by tenant, and two
targets, of which the engine takes only what is weaker than the class's own.
"""

import re
from collections.abc import Mapping

from backend.errors import ApiError
from backend.upstream import ModelInfo

PAGE_CLASS = "interactive"

_PASSED_ON = ("X-Lectern-Program", "X-Lectern-TTFT-Ms", "X-Lectern-TPOT-Ms")
_VALUE = re.compile(r"[\x20-\x7e]{0,128}")


def service_headers(
    model: ModelInfo | None,
    user_id: int,
    service_class: str,
    client_headers: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Headers for a call of `user_id`; none for other model servers than ours. Raises ApiError."""
    if model is None or not model.is_lectern:
        return {}
    headers = {"X-Lectern-Tenant": f"user-{user_id}", "X-Lectern-Class": service_class}
    for name in _PASSED_ON:
        value = (client_headers or {}).get(name, "")
        if not _VALUE.fullmatch(value):
            raise ApiError(
                400,
                "invalid_value",
                f"{name} must have at most 128 printable ASCII characters.",
                param=name,
            )
        if value:
            headers[name] = value
    return headers
