"""The two sides of the comparison, each in a process of its own: `Side` drives one over its standard input and output.

Two thread pools of one process share its cores badly, even when only one of them works.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec

from sightline import Engine, SamplingParams
from sightline.bench.peer import Answer, PeerMissingError, Question, TransformersPeer
from sightline.types import Grammar


class SightlineSide:
    """The offline engine: the server's own core in this process."""

    def __init__(self, model: str, *, num_threads: int, dtype: str = "float32") -> None:
        self._engine = Engine(model, num_threads=num_threads, dtype=dtype, device="cpu")

    def _messages(self, question: Question) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": question.picture}, {"type": "text", "text": question.text}]
        return [{"role": "user", "content": content}]

    def _sampling(self, question: Question, num_tokens: int) -> SamplingParams:
        grammar = Grammar("json_schema", question.schema) if question.schema is not None else None
        return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, grammar=grammar)

    def answer(self, question: Question, num_tokens: int) -> Answer:
        """One request alone, with the time of its first token."""
        began = time.perf_counter()
        first, tokens = None, []
        for delta in self._engine.stream(self._messages(question), self._sampling(question, num_tokens)):
            if first is None and delta.token_ids:
                first = time.perf_counter() - began
            tokens += delta.token_ids
        return Answer(tokens, first, time.perf_counter() - began)

    def answer_batch(self, questions: Sequence[Question], num_tokens: int) -> list[Answer]:
        """All at once, as they would arrive at a server; all with the first one's schema."""
        began = time.perf_counter()
        outputs = self._engine.chat([self._messages(q) for q in questions], self._sampling(questions[0], num_tokens))
        total = time.perf_counter() - began
        return [Answer(output.outputs[0].token_ids, None, total) for output in outputs]

    def close(self) -> None:
        self._engine.close()


class Job(msgspec.Struct):
    """One message to a worker: questions, answered one alone with its first token's time, or as a batch."""

    questions: list[Question]
    num_tokens: int
    batch: bool


class Loaded(msgspec.Struct):
    """A worker's first message; `error` when it cannot work."""

    error: str | None = None


class Side:
    """A worker process. Times are taken inside it, so that the messages cost nothing."""

    def __init__(self, name: str, model: str, num_threads: int, dtype: str) -> None:
        command = [sys.executable, "-m", "sightline.bench.sides", name, model, str(num_threads), dtype]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        loaded = self._receive(Loaded)
        if loaded.error is not None:
            self.close()
            raise PeerMissingError(loaded.error)

    def answer(self, question: Question, num_tokens: int) -> Answer:
        """One request alone, with the time of its first token."""
        return self._ask(Job([question], num_tokens, batch=False))[0]

    def answer_batch(self, questions: Sequence[Question], num_tokens: int) -> list[Answer]:
        """All at once."""
        return self._ask(Job(list(questions), num_tokens, batch=True))

    def _ask(self, job: Job) -> list[Answer]:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(job) + b"\n")
        self._process.stdin.flush()
        return self._receive(list[Answer])

    def _receive(self, kind: Any) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side of the comparison ended with exit code {self._process.wait()}")
        return msgspec.json.decode(line, type=kind)

    def close(self) -> None:
        """End of input ends the worker."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Answers(Protocol):
    def answer(self, question: Question, num_tokens: int) -> Answer: ...

    def answer_batch(self, questions: Sequence[Question], num_tokens: int) -> list[Answer]: ...


def _work(name: str, model: str, num_threads: int, dtype: str) -> int:
    # What a library prints must not end up between the messages.
    wire, sys.stdout = sys.stdout.buffer, sys.stderr

    def send(message: Any) -> None:
        wire.write(msgspec.json.encode(message) + b"\n")
        wire.flush()

    side: _Answers
    try:
        if name == "sightline":
            side = SightlineSide(model, num_threads=num_threads, dtype=dtype)
        else:
            side = TransformersPeer(Path(model), num_threads=num_threads, dtype=dtype)
    except PeerMissingError as error:
        send(Loaded(str(error)))
        return 1
    send(Loaded())
    for line in sys.stdin.buffer:
        job = msgspec.json.decode(line, type=Job)
        if job.batch:
            send(side.answer_batch(job.questions, job.num_tokens))
        else:
            send([side.answer(question, job.num_tokens) for question in job.questions])
    if isinstance(side, SightlineSide):
        side.close()
    return 0


if __name__ == "__main__":
    sys.exit(_work(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
