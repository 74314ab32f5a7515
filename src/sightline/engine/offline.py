"""Engine: the offline form. The same core as the server's, in a thread of this process; no HTTP.

from sightline import Engine, SamplingParams

with Engine() as engine:
    answer = engine.chat([{"role": "user", "content": [{"type": "image", "image": "cat.png"}, "What is it?"]}])
    print(answer.text)
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar, overload

from PIL import Image

from sightline import demo, hub
from sightline.config import EngineConfig
from sightline.engine.client import AsyncEngine
from sightline.engine.node_link import check_nodes
from sightline.engine.output import CompletionOutput, OutputDelta, RequestOutput
from sightline.errors import SettingError
from sightline.prompt.grammar import check_in_time
from sightline.prompt.pipeline import Prompt, PromptPipeline
from sightline.types import EngineStats, LoadProgress, MemoryPlan, SamplingParams

T = TypeVar("T")
Messages = Sequence[dict[str, Any]]
Picture = bytes | str | Path | Image.Image


class Engine:
    """A model loaded into this process.

    model: folder or hub name; None is the bundled demonstration model. chat_template: a name or a file, as for
    `sightline serve`. Further keywords are the fields of `EngineConfig`. Raises `StartupError` when it cannot start.

    `generate` and `chat` take one prompt or a list of them and return one `RequestOutput` or a list; all prompts of a
    call run together. `stream` yields `OutputDelta`s. Each has an async form (`agenerate`, `achat`, `astream`).
    Pictures are bytes, paths, `PIL.Image`s, or the URLs of HTTP requests.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        chat_template: str | None = None,
        on_progress: Callable[[LoadProgress], None] = lambda progress: None,
        **config: Any,
    ) -> None:
        self.config = EngineConfig(model=str(model or demo.model_path()), **config)
        if self.config.dp_size != 1:
            raise SettingError(
                "dp_size: an Engine is one engine; `sightline serve --dp-size` has several behind one port."
            )
        if self.config.node_rank:
            raise SettingError("node_rank: an Engine is node 0; on the others, run `sightline serve` with --node-rank.")
        check_nodes(self.config)
        self._ids = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sightline-loop", daemon=True)
        self._thread.start()
        self._engine: AsyncEngine | None = None
        try:
            self.plan: MemoryPlan = self._run(self._start(chat_template, on_progress))
        except BaseException:
            self.close()
            raise

    async def _start(self, chat_template: str | None, on_progress: Callable[[LoadProgress], None]) -> MemoryPlan:
        config = self.config
        model_dir = hub.resolve(config.model, revision=config.revision, download_dir=config.download_dir)
        # ranks live and die together with a process of their own
        self._engine = AsyncEngine(config, model_dir, in_process=config.tp_size == 1)
        ready = await self._engine.start(on_progress)
        self.pipeline = PromptPipeline(
            model_dir,
            chat_template=chat_template,
            context_length=ready.plan.context_length,
            allow_local=True,
        )
        return ready.plan

    @property
    def stats(self) -> EngineStats:
        """The engine's counters at the last event."""
        assert self._engine is not None
        return self._engine.stats

    # -- whole answers -------------------------------------------------------------------------------------------------

    @overload
    def chat(self, messages: Messages, sampling: SamplingParams | None = None) -> RequestOutput: ...

    @overload
    def chat(self, messages: Sequence[Messages], sampling: SamplingParams | None = None) -> list[RequestOutput]: ...

    def chat(
        self, messages: Messages | Sequence[Messages], sampling: SamplingParams | None = None
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one conversation (a list of OpenAI messages) or a list of conversations."""
        return self._run(self._chat(messages, sampling))

    async def achat(
        self, messages: Messages | Sequence[Messages], sampling: SamplingParams | None = None
    ) -> RequestOutput | list[RequestOutput]:
        """`chat` for an event loop of the caller's."""
        return await self._await(self._chat(messages, sampling))

    def generate(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        sampling: SamplingParams | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Continue raw prompts, without a chat template. images: the prompt's pictures, or a list of them per prompt."""
        return self._run(self._generate(prompts, images, sampling))

    async def agenerate(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        sampling: SamplingParams | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """`generate` for an event loop of the caller's."""
        return await self._await(self._generate(prompts, images, sampling))

    async def _chat(
        self, messages: Messages | Sequence[Messages], sampling: SamplingParams | None
    ) -> RequestOutput | list[RequestOutput]:
        if not messages or isinstance(messages[0], dict):
            return await self._complete(self._chat_prompt(messages), sampling)
        jobs = [self._complete(self._chat_prompt(m), sampling) for m in messages]
        return list(await asyncio.gather(*jobs))

    async def _generate(
        self,
        prompts: str | Sequence[str],
        images: Sequence[Any] | None,
        sampling: SamplingParams | None,
    ) -> RequestOutput | list[RequestOutput]:
        if isinstance(prompts, str):
            return await self._complete(self.pipeline.text(prompts, list(images or ())), sampling)
        groups = images if images is not None else [()] * len(prompts)
        if len(groups) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(groups)} lists of images")
        jobs = [
            self._complete(self.pipeline.text(p, list(g or ())), sampling) for p, g in zip(prompts, groups, strict=True)
        ]
        return list(await asyncio.gather(*jobs))

    async def _complete(self, making: Coroutine[Any, Any, Prompt], sampling: SamplingParams | None) -> RequestOutput:
        prompt, sampling = await making, sampling or SamplingParams()
        output = RequestOutput(
            request_id=f"offline-{next(self._ids)}",
            outputs=[CompletionOutput(index) for index in range(sampling.n)],
            num_prompt_tokens=len(prompt.input_ids),
            num_image_tokens=prompt.num_image_tokens,
        )
        async with aclosing(self._deltas(prompt, sampling, output.request_id)) as deltas:
            async for delta in deltas:
                output.append(delta)
        return output

    def _chat_prompt(self, messages: Any) -> Coroutine[Any, Any, Prompt]:
        return self.pipeline.chat(list(messages))

    async def _deltas(self, prompt: Prompt, sampling: SamplingParams, request_id: str) -> AsyncGenerator[OutputDelta]:
        assert self._engine is not None
        sampling.validate(self.pipeline.tokenizer.vocab_size)
        if sampling.grammar is not None:
            await check_in_time(sampling.grammar)
        answer = await self._engine.submit(prompt, sampling, pipeline=self.pipeline, request_id=request_id)
        with closing(answer):
            async for delta in answer:
                yield delta

    # -- streams -------------------------------------------------------------------------------------------------------

    def stream(self, messages: Messages, sampling: SamplingParams | None = None) -> Iterator[OutputDelta]:
        """Deltas of one conversation's answer as they come; closing the iterator aborts it."""
        queue: SimpleQueue[OutputDelta | BaseException | None] = SimpleQueue()

        async def pump() -> None:
            try:
                async with aclosing(self._stream(messages, sampling)) as deltas:
                    async for delta in deltas:
                        queue.put(delta)
                queue.put(None)
            except BaseException as error:
                queue.put(error)
                raise

        future = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    async def astream(self, messages: Messages, sampling: SamplingParams | None = None) -> AsyncIterator[OutputDelta]:
        """`stream` for an event loop of the caller's."""
        stream = self._stream(messages, sampling)
        try:
            while True:
                try:
                    delta = await self._await(anext(stream))
                except StopAsyncIteration:
                    return
                yield delta
        finally:
            await self._await(stream.aclose())

    async def _stream(self, messages: Messages, sampling: SamplingParams | None) -> AsyncGenerator[OutputDelta]:
        prompt = await self._chat_prompt(messages)
        request_id = f"offline-{next(self._ids)}"
        async with aclosing(self._deltas(prompt, sampling or SamplingParams(), request_id)) as deltas:
            async for delta in deltas:
                yield delta

    # -- plumbing ------------------------------------------------------------------------------------------------------

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _await(self, awaitable: Any) -> Any:
        async def run() -> Any:
            return await awaitable

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), self._loop))

    def close(self) -> None:
        """End the engine and free its memory. Safe to call twice."""
        if self._loop.is_closed():
            return
        if self._engine is not None:
            self._run(self._engine.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
