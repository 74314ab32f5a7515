"""`sightline batch`: a file of requests in OpenAI's batch form to a file of results, resumable after a kill.

A result is appended in one piece when its answer is complete, so the output holds what has been answered at any moment; the same
command run again asks only for the rest. A kill costs the requests in flight, nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import itertools
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx2
import msgspec

from sightline.bench.serving import progress
from sightline.errors import StartupError
from sightline.terminal.service import Service, ServiceError, add_arguments, from_options, split_flags

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
# The server is busy, starting or behind a proxy that waits for it: asked again for as long as it answers anything at all.
_BUSY = {429, 502, 503}
# Its own fault: asked again a few times.
_FAULT = {408, 500}
_ATTEMPTS = 4
# Seconds between attempts of one request, unless the server says how long; and of silence before giving up.
_FIRST_PAUSE, _LONGEST_PAUSE, _PATIENCE = 0.5, 30.0, 300.0
# The server ends a request after its own `--request-timeout` and says so.
_READ_TIMEOUT = 3600.0
_SYNC_INTERVAL = 1.0
_MAX_PROBLEMS = 10

_encode = msgspec.json.Encoder().encode


class _Request(msgspec.Struct):
    """One line of the input."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: Literal["POST"] = "POST"


class _Body(msgspec.Struct):
    stream: bool | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


class _Result(msgspec.Struct):
    custom_id: str


class Job(NamedTuple):
    """A request of the input: where its line lies, in bytes."""

    custom_id: str
    offset: int
    length: int


class BatchError(StartupError):
    """A file cannot be used; the message names it."""

    exit_code = 2


def read_jobs(path: Path) -> list[Job]:
    """Check every line before any is asked. Raises `BatchError` with the first problems and their lines."""
    jobs: list[Job] = []
    lines: dict[str, int] = {}
    problems: list[str] = []
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        custom_id = _check(line)
                        if (first := lines.setdefault(custom_id, number)) != number:
                            raise ValueError(f"custom_id {custom_id!r} is that of line {first} too")
                        jobs.append(Job(custom_id, offset, len(line)))
                    except (msgspec.DecodeError, ValueError) as error:
                        problems.append(f"line {number}: {error}")
                offset += len(line)
    except OSError as error:
        raise BatchError(f"{path}: {error.strerror}") from error
    if problems:
        more = [f"... and {len(problems) - _MAX_PROBLEMS} more"] if len(problems) > _MAX_PROBLEMS else []
        raise BatchError("\n".join([f"{path} cannot be used:", *problems[:_MAX_PROBLEMS], *more]))
    if not jobs:
        raise BatchError(f"{path} holds no requests.")
    return jobs


def _check(line: bytes) -> str:
    request = msgspec.json.decode(line, type=_Request)
    if not request.custom_id:
        raise ValueError("custom_id is empty")
    if request.url not in ROUTES:
        raise ValueError(f"url {request.url!r} is not one of {', '.join(ROUTES)}")
    if msgspec.json.decode(request.body, type=_Body).stream:
        raise ValueError("body.stream is true; a batch has no streams")
    return request.custom_id


class Output:
    """The file of results, locked. done: custom_ids that it holds. Raises `BatchError`; closes with `close`."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise BatchError(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise BatchError(f"{path} is being written by another run.") from error
        self._synced = time.monotonic()
        try:
            self.done = self._read(path)
        except BaseException:
            os.close(self._fd)
            raise

    def _read(self, path: Path) -> set[str]:
        done: set[str] = set()
        end = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    # the writer was killed, or the machine stopped, in the middle of it
                    os.ftruncate(self._fd, end)
                    break
                try:
                    done.add(msgspec.json.decode(line, type=_Result).custom_id)
                except msgspec.DecodeError as error:
                    raise BatchError(f"{path}, line {number}, is not a result: {error}") from error
                end += len(line)
        return done

    def append(self, line: bytes) -> None:
        """Survives the end of this process at once, that of the machine within a second."""
        rest = line + b"\n"
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        if time.monotonic() - self._synced > _SYNC_INTERVAL:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk has it all."""
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Also unlocks."""
        self.sync()
        os.close(self._fd)


class Batch:
    """One run. counts: results written now, by HTTP status; tokens: (in, out)."""

    def __init__(self, service: Service, source: Path, output: Output, concurrency: int) -> None:
        self._service = service
        self._source = os.open(source, os.O_RDONLY)
        self._output = output
        self._concurrency = concurrency
        self._heard = time.monotonic()
        self.counts: Counter[int] = Counter()
        self.tokens = (0, 0)

    async def run(self, jobs: Sequence[Job], count: Any) -> None:
        """Ask all. Raises `ServiceError` when the server is lost; what was answered is written."""
        waiting = iter(jobs)
        limits = httpx2.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        timeout = httpx2.Timeout(10.0, read=_READ_TIMEOUT, write=60.0, pool=None)
        async with httpx2.AsyncClient(
            base_url=self._service.url,
            headers=self._service.headers,
            limits=limits,
            timeout=timeout,
            trust_env=False,
        ) as client:

            async def worker() -> None:
                for job in waiting:
                    await self._one(client, job)
                    count()

            lost: BaseException | None = None
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._concurrency, len(jobs))):
                        group.create_task(worker())
            except* (ServiceError, OSError) as errors:
                lost = errors.exceptions[0]
            if lost is not None:
                raise lost

    def close(self) -> None:
        """Let go of the input."""
        os.close(self._source)

    async def _one(self, client: httpx2.AsyncClient, job: Job) -> None:
        request = msgspec.json.decode(os.pread(self._source, job.length, job.offset), type=_Request)
        headers = {"content-type": "application/json"}
        faults = 0
        for attempt in itertools.count():
            answer = None
            with contextlib.suppress(httpx2.HTTPError):
                answer = await client.post(request.url, content=bytes(request.body), headers=headers)
                final = answer.headers.get("x-should-retry") == "false"
                faults += answer.status_code in _FAULT
                if final or answer.status_code not in _BUSY | _FAULT or faults == _ATTEMPTS:
                    self._heard = time.monotonic()
                    self._write(job.custom_id, answer)
                    return
            self._give_up_on_silence()
            await asyncio.sleep(_pause(attempt, answer))

    def _give_up_on_silence(self) -> None:
        if (code := self._service.exit_code) is not None:
            raise ServiceError("the server ended; the lines above say why.", code or 1)
        if time.monotonic() - self._heard > _PATIENCE:
            raise ServiceError(f"{self._service.url} has not answered anything for {_PATIENCE:g} seconds.", 1)

    def _write(self, custom_id: str, answer: httpx2.Response) -> None:
        response = {
            "status_code": answer.status_code,
            "request_id": answer.headers.get("x-request-id", ""),
            "body": _body(answer),
        }
        result = {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": custom_id,
            "response": response,
            "error": None,
        }
        self._output.append(_encode(result))
        self.counts[answer.status_code] += 1
        self._add(answer)

    def _add(self, answer: httpx2.Response) -> None:
        try:
            usage = msgspec.json.decode(answer.content, type=_Answer).usage or _Usage()
        except msgspec.DecodeError:
            return
        new = usage.prompt_tokens + usage.input_tokens, usage.completion_tokens + usage.output_tokens
        self.tokens = (self.tokens[0] + new[0], self.tokens[1] + new[1])


def _body(answer: httpx2.Response) -> Any:
    try:
        return msgspec.Raw(_encode(msgspec.json.decode(answer.content)))
    except msgspec.DecodeError:
        # a proxy's page
        return {"error": {"message": answer.text[:1000], "type": "server_error", "param": None, "code": None}}


def _pause(attempt: int, answer: httpx2.Response | None) -> float:
    wanted = answer.headers.get("retry-after", "") if answer is not None else ""
    if wanted.isdigit():
        return min(float(wanted), _LONGEST_PAUSE)
    return float(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Output]:
    output = Output(path)
    try:
        yield output
    finally:
        output.close()


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit code."""
    words, flags = split_flags(argv)
    parser = argparse.ArgumentParser(
        prog="sightline batch",
        usage="sightline batch REQUESTS.jsonl -o RESULTS.jsonl [flags] [-- flags of sightline serve]",
        description="Answer a file of requests in OpenAI's batch form. Run again, it asks only for what is missing.",
    )
    parser.add_argument("requests", type=Path, metavar="REQUESTS.jsonl", help="custom_id, method, url and body a line")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="RESULTS.jsonl", help="created or continued"
    )
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="requests at once (default: 32)")
    add_arguments(parser)
    options = parser.parse_args(words)
    if options.concurrency < 1:
        parser.error("--concurrency must be at least 1")
    try:
        return _run(options, flags)
    except StartupError as error:
        print(f"sightline batch: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"sightline batch: {options.output} cannot be written: {error.strerror}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace, flags: Sequence[str]) -> int:
    jobs = read_jobs(options.requests)
    with _opened(options.output) as output:
        if strange := output.done - {job.custom_id for job in jobs}:
            name = sorted(strange)[0]
            raise BatchError(f"{options.output} has a result for {name!r}, which {options.requests} does not ask for.")
        rest = [job for job in jobs if job.custom_id not in output.done]
        if output.done:
            print(f"{len(output.done)} of {len(jobs)} results are there already", file=sys.stderr)
        if not rest:
            return 0
        with from_options(options, flags) as service:
            batch = Batch(service, options.requests, output, options.concurrency)
            began = time.monotonic()
            try:
                with progress(len(rest), quiet=False) as count:
                    asyncio.run(batch.run(rest, count))
            finally:
                batch.close()
                _summarise(batch, len(rest), time.monotonic() - began)
    return 0 if set(batch.counts) == {200} else 1


def _summarise(batch: Batch, wanted: int, seconds: float) -> None:
    written, good = batch.counts.total(), batch.counts[200]
    text = f"{good} answered in {seconds:.1f} s, {batch.tokens[0]} tokens in, {batch.tokens[1]} out"
    if bad := written - good:
        kinds = ", ".join(f"{n} with {code}" for code, n in sorted(batch.counts.items()) if code != 200)
        text += f"; {bad} failed ({kinds}): their lines say why, and are asked again once they are deleted"
    if written < wanted:
        text += f"; {wanted - written} are left: run the same command again"
    print(text, file=sys.stderr)
