# SPDX-License-Identifier: Apache-2.0
"""Fields of a request that hold its answer to a form: OpenAI's and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from meshwen.server.fields import Fields, Ignored, Refused, RefusedTrue, expecting


class JsonSchema(Fields):
    """A schema that the answer follows."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """The form of the answer."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"],
        expecting("text, json_object or json_schema"),
    ]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and with no other")
        return self


class StructuredOutputs(Fields):
    """The form of the answer, in vLLM's words: one of these."""

    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_: str | dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None

    structural_tag: Refused = None
    whitespace_pattern: Refused = None

    disable_additional_properties: RefusedTrue = None
    disable_any_whitespace: RefusedTrue = None
    disable_fallback: Ignored = None

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        asked = (self.choice, self.grammar, self.json_, self.json_object or None, self.regex)
        if sum(one is not None for one in asked) != 1:
            raise ValueError("one of choice, grammar, json, json_object and regex must be given")
        return self
