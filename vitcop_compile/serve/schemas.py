"""Bodies of requests: OpenAI's fields, as far as they are supported, and those of `Sampling` that OpenAI has not.

A field that is null is not given. Fields that are not listed are refused, but for values that say what holds anyway.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from .refusals import Refused
from .requests import Sampling

# Of fields that are not supported, the values that ask for nothing: some clients always send them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
# OpenAI's default for completions.
_COMPLETION_TOKENS = 16
# What no request needs more of: validators take time for each, and write an error for each that is wrong.
_FIELDS, _MESSAGES, _PARTS, _PROMPTS = 64, 2048, 1024, 256
MOST_IDS = 1 << 18  # token ids of all prompts of a request
# Of a body's commas and brackets, those in texts counted as well: more than its token ids, or its characters, can have.
MOST_MARKS = 1 << 19
_Stop = Annotated[str, Field(min_length=1, max_length=1024)]
_Id = Annotated[int, Field(ge=0, lt=2**63)]
_Ids = Annotated[list[_Id], Field(max_length=MOST_IDS, fail_fast=True)]


def _kind_of(prompt: Any) -> str | None:
    """Which of the kinds of a prompt it has to be, by its first item."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else ""
    return "texts" if isinstance(first, str) else "several" if isinstance(first, list) else "ids"


_Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(max_length=_PROMPTS, fail_fast=True), Tag("texts")]
    | Annotated[_Ids, Tag("ids")]
    | Annotated[list[_Ids], Field(max_length=_PROMPTS, fail_fast=True), Tag("several")],
    Discriminator(
        _kind_of, custom_error_type="prompt", custom_error_message="give text or token ids, one of them or a list of them"
    ),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > _FIELDS:
            raise ValueError(f"{len(values)} fields, of which none takes over {_FIELDS}: leave out what is not supported")
        return {name: value for name, value in values.items() if value is not None}


class TextPart(_Body):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageURL(_Body):
    """Where a picture is: a data URL, or one of a host that the server allows. How finely it is looked at is the model's."""

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(_Body):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Body):
    """A turn of a conversation; content: a string, or parts. A developer's is a system's."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(max_length=_PARTS, fail_fast=True)

    @model_validator(mode="before")
    @classmethod
    def _parts(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("content"), str):
            return values | {"content": [{"type": "text", "text": values["content"]}]}
        return values

    @model_validator(mode="after")
    def _pictures(self) -> Message:
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.content):
            raise ValueError(f"a message of role {self.role} holds a picture: only a user's can")
        return self


class StreamOptions(_Body):
    """include_usage: whether a last chunk counts tokens."""

    include_usage: bool = False


class _Request(_Body):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: list[_Stop] = Field([], max_length=16, fail_fast=True)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    user: str | None = None  # says who asks, which nothing here depends on
    # Not OpenAI's.
    top_k: int = 0
    repetition_penalty: float = 1.0
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: list[_Id] = Field([], max_length=64, fail_fast=True)

    @model_validator(mode="before")
    @classmethod
    def _asking(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        supported = cls.model_fields
        asked = {name: value for name, value in values.items() if name in supported or value not in _NEUTRAL.get(name, ())}
        if isinstance(asked.get("stop"), str):
            asked["stop"] = [asked["stop"]]
        return asked

    @model_validator(mode="after")
    def _streamed(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options says how to stream: set stream, or leave it out")
        return self

    @property
    def usage_streamed(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, most: int, asked: int | None, default: int, logprobs: int | None) -> Sampling:
        if asked is not None and asked > most:
            raise Refused(
                400, f"max_tokens={asked} exceeds {most}, the most that {self.model} generates: ask for fewer", "max_tokens"
            )
        new = min(default, most) if asked is None else asked
        if self.min_tokens > new:
            raise Refused(400, f"min_tokens={self.min_tokens} exceeds max_tokens={new}: ask for fewer", "min_tokens")
        return Sampling(
            max_new_tokens=new,
            min_new_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop_ids=tuple(self.stop_token_ids),
            ignore_end=self.ignore_eos,
            seed=self.seed,
            logprobs=logprobs,
            n=self.n,
        )


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _told(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set it, or leave both out")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one number: give one")
        return self

    def sampling(self, most: int) -> Sampling:
        """How answers are drawn; most: new tokens that the model can make, the default. Raises Refused, InputError."""
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(most, asked, most, (self.top_logprobs or 0) if self.logprobs else None)

    @property
    def picture_urls(self) -> list[str]:
        """Of all messages, in order."""
        return [part.image_url.url for message in self.messages for part in message.content if isinstance(part, ImagePart)]


class CompletionRequest(_Request):
    """The body of /v1/completions. prompt: text or token ids, one or several."""

    prompt: _Prompt
    logprobs: int | None = Field(None, ge=0, le=20)

    def sampling(self, most: int) -> Sampling:
        """How answers are drawn; most: new tokens that the model can make. Raises Refused, InputError."""
        return self._sampling(most, self.max_tokens, _COMPLETION_TOKENS, self.logprobs)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each, as text or token ids. Raises Refused where there is none."""
        given: Any = self.prompt
        several = isinstance(given, list) and not (given and isinstance(given[0], int))
        found: list[str | list[int]] = given if several else [given]
        if not found or any(not one for one in found):
            raise Refused(400, "prompt is empty: give text or token ids", "prompt")
        ids = sum(len(one) for one in found if not isinstance(one, str))
        if ids > MOST_IDS:
            raise Refused(400, f"{ids} token ids, the limit is {MOST_IDS}: send fewer prompts", "prompt")
        return found
