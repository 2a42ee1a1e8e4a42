"""What a value of a record may be, and how strictly a part of it is read."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=2**53)]
Layer = Annotated[int, Field(ge=0, lt=10_000)]
Real = Annotated[float, Field(ge=-1e300, le=1e300)]
Name = Annotated[str, Field(pattern=r"\S")]
Number = Real | None  # null where it was not finite, or not measured
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]  # of the unpruned model, and of what became of it


class Part(BaseModel):
    """Strict: a number in quotes is not one.  Keys that nothing reads are allowed."""

    model_config = ConfigDict(strict=True, extra="allow")
