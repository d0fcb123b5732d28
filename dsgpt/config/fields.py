"""Field types shared by every section of a run's config.

pydantic's lax mode would read "12" as a number and True as 1, its strict mode would refuse 1e9 for a count; these
types take what a person writes in YAML (1e9 tokens is a count) and nothing that only looks like it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool
from pydantic_core import PydanticCustomError


def _refuse_lookalikes(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number, not true or false")
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            raise PydanticCustomError("number", "must be a number") from None
        raise PydanticCustomError("number", "must be a number: write it without quotes and in decimal")
    return value


_MOST = 10**15  # more than any run counts; keeps a slipped finger from becoming an endless computation

Int = Annotated[int, BeforeValidator(_refuse_lookalikes)]
Count = Annotated[int, BeforeValidator(_refuse_lookalikes), Field(ge=1, le=_MOST)]
CountOrZero = Annotated[int, BeforeValidator(_refuse_lookalikes), Field(ge=0, le=_MOST)]
Real = Annotated[float, BeforeValidator(_refuse_lookalikes)]
Bool = StrictBool


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
