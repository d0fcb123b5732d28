"""The HTTP side: reads requests, hands them to the worker, writes answers as they come.

Everything that is wrong with a request is answered by 4xx in OpenAI's form before the model sees it; a client that leaves
frees its place in the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dsgpt.checkpoint.inference import Loaded
from dsgpt.errors import DsgptError
from dsgpt.generate.chat import Chat
from dsgpt.generate.decoder import refuse_prompt
from dsgpt.generate.sampling import Sampling
from dsgpt.generate.text import Prompt, text_prompt
from dsgpt.serve.protocol import (
    Answer,
    ChatRequest,
    CompletionRequest,
    Request,
    RequestError,
    error_object,
    parse,
)
from dsgpt.serve.worker import Event, Job, Worker

MAX_BODY_BYTES = 4 << 20  # and less where the context is small
_BODY_BYTES_PER_TOKEN, _BODY_BYTES = 64, 64 << 10
_DROPPED_BYTES = 64 << 20
_ENCODING_AT_ONCE = 2  # long texts hold the interpreter for a while, and decoding waits
_SECONDS_TO_LOOK = 1.0  # how often it is asked whether a client is still there


class Server:
    """One loaded model, its worker, and the handlers of its routes."""

    def __init__(self, loaded: Loaded, name: str, chat: Chat | None, worker: Worker, api_key: str | None):
        self._loaded, self._name, self._chat, self._worker = loaded, name, chat, worker
        self._api_key = api_key
        self._max_body = min(MAX_BODY_BYTES, _BODY_BYTES + _BODY_BYTES_PER_TOKEN * worker.context)
        vocabulary = loaded.tokenizer.backend.get_vocab(with_added_tokens=True)
        self._most_characters = worker.context * max(map(len, vocabulary))  # more can be no prompt
        self._encoding = asyncio.Semaphore(_ENCODING_AT_ONCE)

    def app(self, hosts: Sequence[str]) -> Starlette:
        """`hosts` are the names that it answers to: a web page of another name cannot read from it."""
        routes = [
            Route("/v1/chat/completions", self._checked(self._chats), methods=["POST"]),
            Route("/v1/completions", self._checked(self._completions), methods=["POST"]),
            Route("/v1/models", self._checked(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._checked(self._models), methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
        ]
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
        return Starlette(routes=routes, middleware=[trusted], exception_handlers={HTTPException: _http_error})

    def _checked(
        self, handler: Callable[[HttpRequest], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """Errors of requests become answers; who has no key is turned away."""

        async def checked(request: HttpRequest) -> Response:
            if request.method == "POST" and not _is_json(request):
                return _error("the body is to be application/json", 415, None, None)
            try:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if self._api_key and not secrets.compare_digest(given.encode(), self._api_key.encode()):
                    raise RequestError(401, "the API key is missing or wrong", "invalid_api_key")
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except RequestError as error:
                return _error(error.problems[0].what, error.status, error.code, error.parameter)

        return checked

    async def _health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "model": self._name, **self._worker.load})

    async def _models(self, request: HttpRequest) -> Response:
        one = {"id": self._name, "object": "model", "created": 0, "owned_by": "dsgpt"}
        asked = request.path_params.get("name")
        if asked == self._name:
            return JSONResponse(one)
        if asked is not None:
            raise RequestError(404, f"there is no such model here: this is {self._name}", "model_not_found", "model")
        return JSONResponse({"object": "list", "data": [one]})

    async def _completions(self, request: HttpRequest) -> Response:
        asked: CompletionRequest = await self._parsed(CompletionRequest, request)
        tokenizer = self._loaded.tokenizer
        text = asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0]
        prompt = await self._prompt(lambda: text_prompt(tokenizer, text), len(text))
        return await self._answer(request, asked, prompt, asked.max_tokens or 16)

    async def _chats(self, request: HttpRequest) -> Response:
        asked: ChatRequest = await self._parsed(ChatRequest, request)
        if self._chat is None:
            raise RequestError(
                400, "this model's tokenizer has no chat template: use /v1/completions", None, "messages"
            )
        chat, tools = self._chat, None if asked.tool_choice == "none" else asked.tools
        size = sum(len(str(message.get("content", ""))) for message in asked.messages)
        prompt = await self._prompt(lambda: chat.prompt(asked.messages, tools), size)
        limit = asked.max_completion_tokens or asked.max_tokens or self._worker.context
        return await self._answer(request, asked, prompt, limit)

    async def _parsed(self, kind: type[Request], request: HttpRequest) -> Any:
        return await run_in_threadpool(parse, kind, await _body(request, self._max_body))

    async def _prompt(self, make: Callable[[], Prompt], characters: int) -> Prompt:
        """In a thread: a long text takes a while to encode, and the others are not to wait for it."""
        if characters > self._most_characters:
            text = f"the prompt does not fit into the model's context of {self._worker.context} tokens"
            raise RequestError(400, text, "context_length_exceeded")
        try:
            async with self._encoding:
                prompt = await run_in_threadpool(make)
            refuse_prompt(len(prompt.ids), self._worker.context)
        except DsgptError as error:
            code = "context_length_exceeded" if "context" in str(error) else "invalid_value"
            raise RequestError(400, _one_line(error), code) from error
        return prompt

    async def _answer(self, request: HttpRequest, asked: Request, prompt: Prompt, limit: int) -> Response:
        sampling = Sampling(
            max_new_tokens=limit,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_k=asked.top_k or 0,
            top_p=asked.top_p or 1.0,
            repetition_penalty=asked.repetition_penalty or 1.0,
            stop=asked.stops,
            seed=random.SystemRandom().getrandbits(62) if asked.seed is None else asked.seed,
        )
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = self._worker.submit(prompt, sampling, deliver)
        if job is None:
            raise RequestError(429, "too many requests are waiting: try again", "rate_limit_exceeded")
        answer = Answer(asked, self._name)
        if asked.stream:
            stream = self._stream(job, events, answer, asked.wants_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        try:
            event = await self._whole(request, events)
            if event.error is not None:
                return _error(_one_line(event.error), 500, None, None)
            return JSONResponse(answer.whole(event.text, event.finish or "stop", len(prompt.ids), event.tokens))
        finally:
            self._worker.cancel(job)

    async def _whole(self, request: HttpRequest, events: asyncio.Queue[Event]) -> Event:
        """All of an answer as one event; the end of it where the client has left."""
        text, looked = "", time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(events.get(), timeout=_SECONDS_TO_LOOK)
                text += event.text
                if event.error is not None or event.finish is not None:
                    return replace(event, text=text)
            if time.monotonic() - looked > _SECONDS_TO_LOOK:
                looked = time.monotonic()
                if await request.is_disconnected():
                    return Event(text, "stop")

    async def _stream(
        self, job: Job, events: asyncio.Queue[Event], answer: Answer, wants_usage: bool
    ) -> AsyncIterator[str]:
        try:
            yield _data(answer.chunk("", is_first=True))
            while True:
                event = await events.get()
                if event.error is not None:
                    yield _data(error_object(_one_line(event.error), 500, None, None))
                    return
                if event.text:
                    yield _data(answer.chunk(event.text))
                if event.finish is not None:
                    yield _data(answer.chunk("", event.finish))
                    if wants_usage:
                        yield _data(answer.usage_chunk(len(job.prompt.ids), event.tokens))
                    yield "data: [DONE]\n\n"
                    return
        finally:  # also where the client has left
            self._worker.cancel(job)


def _is_json(request: HttpRequest) -> bool:
    """Asked for, because a web page that is open on this machine could send a text to it without asking."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def _body(request: HttpRequest, most: int) -> bytes:
    """At most so many bytes, whatever the header says. More are read and dropped, up to a bound: a client that is still
    sending does not see an answer."""
    body, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= most:
            body += piece
        elif size > _DROPPED_BYTES:
            break
    if size > most:
        raise RequestError(413, f"the request is larger than {most} bytes", "request_too_large")
    return bytes(body)


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _error(message: str, status: int, code: str | None, parameter: str | None) -> JSONResponse:
    return JSONResponse(error_object(message, status, code, parameter), status_code=status)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(str(error.detail), error.status_code, None, None)
