"""What requests may say, and what answers look like: OpenAI's completions and chat completions.

A field that would change the answer and is not implemented is refused, not ignored: `n`, `logprobs`, penalties, a forced
tool. Tools that are offered are told to the model where its template can; what it answers, calls too, is text. What only
describes the request (`user`, `metadata`, `store`) is read past. `top_k` and `repetition_penalty` are as in `dsgpt generate`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsgpt.errors import DsgptError

Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]


class RequestError(DsgptError):
    """A request that is answered with a status of 4xx. `code` as OpenAI names it, where it has a name."""

    def __init__(self, status: int, message: str, code: str | None = None, parameter: str | None = None):
        super().__init__(message)
        self.status, self.code, self.parameter = status, code, parameter


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class Request(BaseModel):
    """What both kinds have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    stop: Annotated[str, Field(min_length=1)] | Texts | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    # One value alone is implemented.
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    # Without effect on the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None
    suffix: None = None


class ChatRequest(Request):
    messages: list[dict[str, Any]] = Field(max_length=1024)
    tools: list[dict[str, Any]] | None = Field(None, max_length=256)
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


def parse(kind: type[Request], body: bytes) -> Any:
    """Raises RequestError (400) that names every field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        names = [".".join(map(str, one["loc"])) for one in found]
        text = "; ".join(f"{name or 'body'}: {one['msg']}" for name, one in zip(names[:8], found, strict=False))
        raise RequestError(400, text, "invalid_value", names[0] or None) from error


class Answer:
    """The objects of one answer, whole or in chunks."""

    def __init__(self, request: Request, model: str):
        self._is_chat = isinstance(request, ChatRequest)
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        self._id, self._created, self._model = f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model

    def whole(self, text: str, finish: str, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {"text": text}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._object(kind, said, finish) | {"usage": usage(prompt_tokens, tokens)}

    def chunk(self, text: str, finish: str | None = None, is_first: bool = False) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self._is_chat:
            said = {
                "delta": ({"role": "assistant"} if is_first else {}) | ({"content": text} if text or is_first else {})
            }
        return self._object("chat.completion.chunk" if self._is_chat else "text_completion", said, finish)

    def usage_chunk(self, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        return self.chunk("") | {"choices": [], "usage": usage(prompt_tokens, tokens)}

    def _object(self, kind: str, said: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": [choice],
        }


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def error_object(message: str, status: int, code: str | None, parameter: str | None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}
