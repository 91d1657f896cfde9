"""Numbers of rows in addresses."""

from typing import Annotated

from pydantic import AfterValidator

_MOST = 2**31 - 1  # an INTEGER of PostgreSQL


def _storable(number: int) -> int:
    return number if 0 < number <= _MOST else 0


# A number that no row can have becomes 0, which no row has: the answer is an ordinary 404.
RowId = Annotated[int, AfterValidator(_storable)]
