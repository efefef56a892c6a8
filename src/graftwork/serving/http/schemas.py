"""What clients may ask: OpenAI's fields and vLLM's additions. A field that nothing here knows is an error, never dropped.

Three kinds of fields are no part of the models: those in HARMLESS say nothing about the answer and are accepted; those in NEUTRAL are
accepted with a value that changes nothing; all others are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ...errors import UsageError
from ..engine.request import Sampling

#: below this temperature the likeliest token is all that is left
COLD = 1e-4


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
Text = Annotated[str, Field(max_length=1 << 20)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=(), populate_by_name=True)
    HARMLESS: ClassVar[frozenset[str]] = frozenset()
    NEUTRAL: ClassVar[dict[str, tuple]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {field: value for field, value in values.items()
                if field not in cls.HARMLESS and not (field in cls.NEUTRAL and (value is None or value in cls.NEUTRAL[field]))}


class StreamOptions(Strict):
    NEUTRAL: ClassVar[dict[str, tuple]] = {"include_obfuscation": (True, False), "continuous_usage_stats": (False,)}
    include_usage: bool | None = None


class JsonSchema(Strict):
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None and self.json_schema.schema_ is not None):
            raise ValueError('json_schema: {"schema": ...} belongs to type json_schema, and to it only')
        return self


class Part(Strict):
    name: str = Field(max_length=512)
    weight: Float = Field(1.0, ge=-100, le=100)


class Asked(Strict):
    """What completions and chat have in common."""

    HARMLESS: ClassVar[frozenset[str]] = frozenset({"user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier",
                                                    "prompt_cache_key"})
    model: str = Field(max_length=512)
    adapters: list[Part] | None = Field(None, min_length=1, max_length=16, description="on `model`, the base: the sum of their changes, "
                                                                                     "each times its weight")
    max_tokens: Int | None = Field(None, ge=1, le=1 << 31)
    temperature: Float | None = Field(None, ge=0, description="1 by default, as OpenAI's; 0 is greedy")
    top_p: Float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=-1, le=1 << 31, description="0 and -1: all tokens")
    min_p: Float | None = Field(None, ge=0, le=1)
    repetition_penalty: Float | None = Field(None, ge=0.01, le=100)
    presence_penalty: Float | None = Field(None, ge=-2, le=2)
    frequency_penalty: Float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: Int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stop_token_ids: list[Int] | None = Field(None, max_length=256)
    ignore_eos: bool | None = None
    min_tokens: Int | None = Field(None, ge=0)
    n: Int | None = Field(None, ge=1, le=64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | bool | Text | None = None
    guided_regex: Text | None = None
    guided_grammar: Text | None = Field(None, description="a Lark grammar")

    @model_validator(mode="after")
    def _fit_together(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to stream: true")
        if self.guide is not None and self.min_tokens:
            raise ValueError("min_tokens cannot be combined with a guide: the grammar says when the answer ends")
        return self

    @property
    def guide(self) -> dict[str, Any] | None:
        """Raises ValueError for more than one."""
        found: list[dict[str, Any]] = []
        if self.guided_json is not None:
            found.append({"json_schema": self.guided_json})
        if self.guided_regex is not None:
            found.append({"regex": self.guided_regex})
        if self.guided_grammar is not None:
            found.append({"grammar": self.guided_grammar})
        kind = None if self.response_format is None else self.response_format.type
        if kind == "json_object":
            found.append({"json_object": True})
        elif kind == "json_schema":
            found.append({"json_schema": self.response_format.json_schema.schema_})
        if len(found) > 1:
            raise ValueError("response_format, guided_json, guided_regex and guided_grammar exclude each other")
        return found[0] if found else None

    @property
    def usage_at_end(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def reported(self) -> int | None:
        """How many alternatives of every token to report; None: no logprobs."""
        raise NotImplementedError

    def sampling(self, max_tokens: int, choice: int) -> Sampling:
        """For the choice of this number. Raises UsageError."""
        temperature = 1.0 if self.temperature is None else self.temperature
        stop = _given(self.stop, ())
        return Sampling(
            max_tokens=max_tokens, temperature=0.0 if temperature < COLD else temperature, top_p=_given(self.top_p, 1.0),
            top_k=max(_given(self.top_k, 0), 0), min_p=_given(self.min_p, 0.0), repetition_penalty=_given(self.repetition_penalty, 1.0),
            presence_penalty=_given(self.presence_penalty, 0.0), frequency_penalty=_given(self.frequency_penalty, 0.0),
            seed=None if self.seed is None else self.seed + choice, logit_bias=self.logit_bias or {},
            stop=(stop,) if isinstance(stop, str) else tuple(stop), stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos), min_tokens=_given(self.min_tokens, 0), logprobs=self.reported, guide=self.guide)

    def check_tokens(self, vocabulary: int) -> None:
        """Raises UsageError for token ids that the model's head does not have."""
        for field, tokens in (("logit_bias", self.logit_bias or {}), ("stop_token_ids", self.stop_token_ids or ())):
            wrong = [token for token in tokens if not 0 <= token < vocabulary]
            if wrong:
                raise UsageError(f"{field}: there is no token {wrong[0]}", remedy=f"tokens are 0 to {vocabulary - 1}")


class CompletionRequest(Asked):
    NEUTRAL: ClassVar[dict[str, tuple]] = {"best_of": (1,), "echo": (False,), "suffix": ("",), "use_beam_search": (False,),
                                           "skip_special_tokens": (True,), "add_special_tokens": (True,)}
    prompt: Text | list[Text] | list[Int] | list[list[Int]]
    logprobs: Int | None = Field(None, ge=0, le=20)

    @property
    def reported(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(part, int) for part in self.prompt):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ToolFunction(Strict):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: ToolFunction


class Message(Strict):
    NEUTRAL: ClassVar[dict[str, tuple]] = {"refusal": (), "audio": (), "annotations": ([],), "function_call": ()}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: Text | None = None


class ChatRequest(Asked):
    NEUTRAL: ClassVar[dict[str, tuple]] = {"tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "modalities": (["text"],),
                                           "function_call": ("none", "auto"), "add_generation_prompt": (True,),
                                           "continue_final_message": (False,), "skip_special_tokens": (True,),
                                           "add_special_tokens": (False,), "use_beam_search": (False,), "echo": (False,)}
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Int | None = Field(None, ge=1, le=1 << 31)
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _limits_agree(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs belongs to logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def reported(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return [message.model_dump(exclude_none=True) for message in self.messages]


class LoadRequest(Strict):
    lora_name: str = Field(max_length=512)
    lora_path: str = Field(max_length=4096, description="a folder, or a URL, with #sha256=... where its content is known")
    load_inplace: bool | None = Field(None, description="replace an adapter of that name")


class UnloadRequest(Strict):
    lora_name: str = Field(max_length=512)


class AliasRequest(Strict):
    name: str = Field(max_length=512)
    version: str = Field(max_length=512, description="`name` stands for `name@version` from now on")


class TokenizeRequest(Strict):
    NEUTRAL: ClassVar[dict[str, tuple]] = {"add_generation_prompt": (True,)}
    model: str | None = Field(None, max_length=512)
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens belongs to prompt: the template of a conversation has them already")
        return self


class DetokenizeRequest(Strict):
    model: str | None = Field(None, max_length=512)
    tokens: list[Int] = Field(max_length=1 << 20)


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
