"""The base of everything that is read from YAML or JSON."""

from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

LATER: dict[str, Any] = {"later": True}
"""`Field(json_schema_extra=LATER)` marks a field that came after the first release of a section: at its default it is
left out of every dump, so that adding it changes no run_id."""


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values don't change, docstrings are the documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _leave_out_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        for name, default in _later(type(self)).items():
            if getattr(self, name) == default:
                dumped.pop(name, None)
        return dumped


@cache
def _later(section: type[Section]) -> dict[str, Any]:
    """Defaults of the fields of a section that came later."""
    fields = section.model_fields.items()
    return {name: one.get_default(call_default_factory=True) for name, one in fields if one.json_schema_extra == LATER}
