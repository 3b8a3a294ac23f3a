# The native module's functions take addresses and plain numbers; ops/ gives them types and checks.
from typing import Any

def __getattr__(name: str) -> Any: ...
