"""Names of tests that are the same in every process."""

import re
from typing import Any


def without_addresses(value: Any) -> str:
    """A parameter of a test as text, without the addresses of functions."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
