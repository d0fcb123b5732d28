"""The HTTP side: reads requests, hands them to the worker, writes answers as they come.

Everything that is wrong with a request is answered by 4xx in OpenAI's form before the model sees it; a client that leaves
frees its place in the batch.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
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

MAX_BODY_BYTES = 4 << 20


class Server:
    """One loaded model, its worker, and the handlers of its routes."""

    def __init__(self, loaded: Loaded, name: str, chat: Chat | None, worker: Worker, api_key: str | None):
        self._loaded, self._name, self._chat, self._worker = loaded, name, chat, worker
        self._api_key = api_key

    def app(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            await run_in_threadpool(self._worker.close)

        routes = [
            Route("/v1/chat/completions", self._checked(self._chats), methods=["POST"]),
            Route("/v1/completions", self._checked(self._completions), methods=["POST"]),
            Route("/v1/models", self._checked(self._models), methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})

    def _checked(
        self, handler: Callable[[HttpRequest], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """Errors of requests become answers; who has no key is turned away."""

        async def checked(request: HttpRequest) -> Response:
            try:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if self._api_key and not secrets.compare_digest(given.encode(), self._api_key.encode()):
                    raise RequestError(401, "the API key is missing or wrong", "invalid_api_key")
                return await handler(request)
            except RequestError as error:
                return _error(error.problems[0].what, error.status, error.code, error.parameter)

        return checked

    async def _health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "model": self._name, **self._worker.load})

    async def _models(self, request: HttpRequest) -> Response:
        one = {"id": self._name, "object": "model", "created": 0, "owned_by": "dsgpt"}
        return JSONResponse({"object": "list", "data": [one]})

    async def _completions(self, request: HttpRequest) -> Response:
        asked: CompletionRequest = parse(CompletionRequest, await _body(request))
        prompt = await self._prompt(lambda: text_prompt(self._loaded.tokenizer, asked.prompt))
        return await self._answer(request, asked, prompt, asked.max_tokens or 16)

    async def _chats(self, request: HttpRequest) -> Response:
        asked: ChatRequest = parse(ChatRequest, await _body(request))
        if self._chat is None:
            raise RequestError(
                400, "this model's tokenizer has no chat template: use /v1/completions", None, "messages"
            )
        chat, tools = self._chat, None if asked.tool_choice == "none" else asked.tools
        prompt = await self._prompt(lambda: chat.prompt(asked.messages, tools))
        limit = asked.max_completion_tokens or asked.max_tokens or self._worker.context
        return await self._answer(request, asked, prompt, limit)

    async def _prompt(self, make: Callable[[], Prompt]) -> Prompt:
        """In a thread: a long text takes a while to encode, and the others are not to wait for it."""
        try:
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
        text = ""
        try:
            while True:
                event = await self._next(request, events)
                text += event.text
                if event.error is not None:
                    return _error(_one_line(event.error), 500, None, None)
                if event.finish is not None:
                    return JSONResponse(answer.whole(text, event.finish, len(prompt.ids), event.tokens))
        finally:
            self._worker.cancel(job)

    async def _next(self, request: HttpRequest, events: asyncio.Queue[Event]) -> Event:
        """The next event, or the end where the client has left meanwhile."""
        while True:
            try:
                return await asyncio.wait_for(events.get(), timeout=1.0)
            except TimeoutError:
                if await request.is_disconnected():
                    return Event(finish="stop")

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


async def _body(request: HttpRequest) -> bytes:
    """At most MAX_BODY_BYTES, whatever the header says."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(413, f"the request is larger than {MAX_BODY_BYTES} bytes", "request_too_large")
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
