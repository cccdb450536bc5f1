"""Reports of SGLang's rounds to one client, which may also decide when each round runs (lock-step).

The channel (`specrl.sglang.plugin.transport`) sends the fields of `RoundReport`. A client that wants lock-step sends
{"kind": "hold"}; from the answer {"kind": "held"} on, no round runs without a permit. {"kind": "permit", "rounds": 1,
"requests": ["id", …]} permits one round, as soon as these requests have arrived. Meanwhile SGLang takes in requests,
aborts, pauses and weights as usual. A round waits for at most SPECRL_LOCKSTEP seconds, and not for a client that has
gone.

Everything happens in the scheduler's thread. ZeroMQ's own thread sends the queued messages, so nothing here blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from specrl.core.checks import require
from specrl.core.clock import Clock, WallClock
from specrl.sglang.plugin.hooks import PROCESS, WORKER, Failsafe, log, plan_name
from specrl.sglang.plugin.settings import Settings
from specrl.sglang.plugin.transport import Channel, Message

_POLL_S = 0.001  # wait for a permit, before requests are taken in again


@dataclass(frozen=True, slots=True)
class RoundReport:
    """The results of a round, or of a prefill, for its B requests.

    A round's seconds go from the end of the one before it to its own end, scheduling included, but without waiting for
    permits or requests. On a GPU, or if rounds overlap, the host cannot tell drafting from verifying: all is `other_s`.
    A prefill has no plan, correct drafts and contexts.
    """

    kind: Literal["round", "prefill"]
    requests: Sequence[str]  # B ids of SGLang
    tokens: Sequence[Sequence[int]]  # B lists of new tokens
    finished: Sequence[str]  # ids of the requests that ended
    prefill_s: float  # of a prefill: its seconds; of a round: those of all prefills since the round before
    plan: str = "0"  # written out
    correct: Sequence[int] = ()  # B numbers of correct drafts
    contexts: Sequence[int] = ()  # B numbers of tokens that were known before the round
    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the round."""
        return self.draft_s + self.verify_s + self.other_s


@dataclass
class _Launched:
    """A batch that runs, and its times on the host."""

    began: float  # the turn of the scheduler
    run_s: float = 0.0
    verify_s: float | None = None  # None: nothing was verified
    plan: str = "0"


class RoundHooks:
    """The functions that SGLang calls in its scheduler. Only the first rank reports.

    Args:
        settings: settings with a socket for rounds.
        tp_rank, tp_size: return the rank of tensor parallelism and the number of ranks.
        clock: times the rounds; None: the wall clock.
        max_waiting: reports that may wait for the client; more are dropped and counted.
    """

    def __init__(
        self,
        settings: Settings,
        tp_rank: Callable[[], int],
        tp_size: Callable[[], int],
        clock: Clock | None = None,
        max_waiting: int = 4096,
    ) -> None:
        self.safe = Failsafe("reporting of rounds")
        self._settings, self._tp_rank, self._tp_size, self._max_waiting = settings, tp_rank, tp_size, max_waiting
        self._clock: Clock = WallClock() if clock is None else clock
        self._held = False  # whether the client decides when rounds run
        self._permits = 0
        self._required: frozenset[str] = frozenset()  # requests that must have arrived before the next round
        self._turn = self._ended = self._prefill_s = 0.0
        self._running: _Launched | None = None
        self._launched: deque[_Launched] = deque(maxlen=8)

    def around_ingest(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ingest_requests(scheduler), which begins every turn of the scheduler's loop."""
        requests = original(*args, **kwargs)
        if self.safe.on:
            requests += self.safe.call(self._wait, args[0], lambda: original(*args, **kwargs)) or []
        return requests

    def around_run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around run_batch(scheduler, batch)."""
        self._running = launched = _Launched(self._turn)
        began = self._clock.now()
        result = original(*args, **kwargs)
        launched.run_s = self._clock.now() - began
        self._launched.append(launched)
        return result

    def around_verify(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around verify(worker, batch), which verifies the drafts of a batch."""
        running = self._running
        if running is not None:
            batch = WORKER.arguments(args, kwargs)[1]
            running.plan = self.safe.call(lambda: plan_name(batch.spec_info)) or "0"  # verifying replaces spec_info
        began = self._clock.now()
        result = original(*args, **kwargs)
        if running is not None:
            running.verify_s = self._clock.now() - began
        return result

    def around_process(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around process_batch_result(scheduler, batch, result)."""
        scheduler, batch, result = PROCESS.arguments(args, kwargs)
        before = self.safe.call(lambda: [len(request.output_ids) for request in batch.reqs])
        answer = original(*args, **kwargs)
        if before is not None:
            self.safe.call(self._processed, scheduler, batch, result, before)
        return answer

    def close(self) -> None:
        """Stop listening; for the thread that calls the hooks."""
        if self._channel is not None:
            self._channel.close()

    @cached_property
    def _channel(self) -> Channel | None:
        """The socket, opened at the first call, in the process that serves; None on other ranks."""
        if self._tp_rank() != 0:
            return None
        lockstep_s, address = self._settings.lockstep_s, self._settings.rounds
        if lockstep_s and self._tp_size() > 1:
            raise ValueError(f"lock-step is for one rank, but tensor parallelism has {self._tp_size()}")
        assert address is not None
        channel = Channel(address, self._max_waiting, {"lockstep_s": lockstep_s})
        log.warning("specrl plugin: rounds are reported on %s", address)
        return channel

    def _wait(self, scheduler: Any, ingest: Callable[[], list[Any]]) -> list[Any]:
        """In lock-step, take in requests until the next round is permitted."""
        requests: list[Any] = []
        channel = self._channel
        if channel is not None:
            self._receive(channel, scheduler)
            began = self._clock.now()
            while self._held and channel.connected and not (scheduler._engine_paused or scheduler.gracefully_exit):
                if self._permits and self._required <= _present(scheduler):
                    break
                if self._clock.now() - began > self._settings.lockstep_s:
                    limit = f"{self._settings.lockstep_s:g} s (SPECRL_LOCKSTEP)"
                    log.warning("specrl plugin: no permit came for %s; SGLang goes on by itself", limit)
                    channel.refuse(f"no permit came for {limit}, or not all of its requests")
                    break
                self._receive(channel, scheduler, 0.0 if self._permits else _POLL_S)
                requests += ingest()
        self._turn = self._clock.now()
        return requests

    def _receive(self, channel: Channel, scheduler: Any, timeout_s: float = 0.0) -> None:
        """Take the messages of the client."""
        while (header := channel.receive(timeout_s)) is not None:
            timeout_s = 0.0
            kind = header.get("kind")
            if kind == "hello":
                self._held, self._permits, self._required = False, 0, frozenset()
            elif kind == "hold" and not self._settings.lockstep_s:
                channel.refuse("lock-step must be allowed; launch SGLang with SPECRL_LOCKSTEP=120")
            elif kind == "hold" and scheduler.enable_overlap:
                channel.refuse("lock-step needs one round at a time; launch SGLang with --disable-overlap-schedule")
            elif kind == "hold":
                self._held, self._permits = True, 0
                channel.send(Message({"kind": "held"}))
            else:
                try:
                    require(kind == "permit", "kind", "'hold' or 'permit'", kind)
                    self._permits, self._required = int(header["rounds"]), frozenset(map(str, header["requests"]))
                except (ValueError, KeyError, TypeError) as error:
                    form = '{"kind": "permit", "rounds": 1, "requests": []}'
                    channel.refuse(f"a permit must be {form}, but got {error!r}")

    def _processed(self, scheduler: Any, batch: Any, result: Any, before: Sequence[int]) -> None:
        """Report a batch; `before` is the number of output tokens that each of its requests had."""
        now = self._clock.now()
        if not self._launched:
            return
        launched = self._launched.popleft()
        seconds = now - max(launched.began, self._ended)
        self._ended = now
        mode, channel = batch.forward_mode, self._channel
        if channel is None or not channel.connected or not (mode.is_decode() or mode.is_extend()):
            return
        requests = [request.rid for request in batch.reqs]
        pairs = list(zip(batch.reqs, before, strict=True))
        tokens = [list(request.output_ids[: request.finished_len][count:]) for request, count in pairs]  # None: no end
        finished = [request.rid for request in batch.reqs if request.finished()]
        if mode.is_extend():
            self._prefill_s += seconds
            self._report(channel, RoundReport("prefill", requests, tokens, finished, seconds))
            return
        self._permits = max(self._permits - 1, 0)
        draft_s = verify_s = 0.0
        if str(scheduler.device) == "cpu" and not scheduler.enable_overlap:
            verify_s = launched.run_s if launched.verify_s is None else launched.verify_s
            draft_s = launched.run_s - verify_s
        correct = getattr(result, "num_correct_drafts_per_req_cpu", None) if launched.verify_s is not None else None
        prefill_s, self._prefill_s = self._prefill_s, 0.0
        correct = correct or [0] * len(tokens)
        contexts = [len(request.origin_input_ids) + count for request, count in pairs]
        times = {"draft_s": draft_s, "verify_s": verify_s, "other_s": max(seconds - draft_s - verify_s, 0.0)}
        done = RoundReport("round", requests, tokens, finished, prefill_s, launched.plan, correct, contexts, **times)
        self._report(channel, done)

    def _report(self, channel: Channel, report: RoundReport) -> None:
        if not channel.send(Message(asdict(report))):
            channel.dropped += 1


def _present(scheduler: Any) -> frozenset[str]:
    """Ids of the requests that wait or run, and have not ended."""
    requests = [*scheduler.waiting_queue, *scheduler.running_batch.reqs]
    if scheduler.last_batch is not None:
        requests += scheduler.last_batch.reqs
    if scheduler.chunked_req is not None:
        requests.append(scheduler.chunked_req)
    return frozenset(request.rid for request in requests if not request.finished())
