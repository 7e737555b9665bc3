"""Numbers and switches as JSON has them: no text passes for a number, and no switch either."""

from typing import Annotated

from pydantic import Field

__all__ = ["Integer", "Number", "Switch"]

Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
"""Whole numbers too."""
Switch = Annotated[bool, Field(strict=True)]
