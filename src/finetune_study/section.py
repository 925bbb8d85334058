"""The base of everything that is read from YAML or JSON."""

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
        for name, field in type(self).model_fields.items():
            if field.json_schema_extra == LATER and getattr(self, name) == field.get_default(call_default_factory=True):
                dumped.pop(name, None)
        return dumped
