"""SGLang's rounds as they were: plan, tokens and seconds of each, told to one client, who may set their pace.

A 'round' says: plan; requests [B] (SGLang's ids), contexts [B] (tokens known before it), correct [B] (drafts that
stood), tokens (B lists: what was kept), finished (ids); draft_s, verify_s, other_s and prefill_s, the seconds of the
prefills since the round before. A 'prefill': requests, tokens, finished, seconds. A round's seconds go from the end of
what was before it to the end of what it did, scheduling included; waiting for leave or for requests is not in them.
On a GPU, or where rounds overlap, the host cannot tell drafting from verifying, and all is in other_s.

In lock-step a round waits until the client lets it go, and all requests that it names are there. Meanwhile SGLang takes
in requests, weights and pauses as ever. It waits no longer than SPECRL_LOCKSTEP seconds, nor for one who has gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specrl.core.clock import WallClock
from specrl.sglang.plugin.failsafe import Failsafe, log
from specrl.sglang.plugin.round_socket import RoundSocket
from specrl.sglang.plugin.settings import Settings

_RING = 4096  # lines that may wait for the client
_LOOK_S = 0.001  # between two looks for requests while a round waits


@dataclass
class _Launched:
    """A batch on its way: when its turn began, what the host saw of it."""

    began: float
    run_s: float = 0.0
    verify_s: float | None = None  # None: nothing was verified
    plan: str = "0"


class RoundHooks:
    """The functions that SGLang calls in its scheduler, of which only the first rank's tells.

    Args:
        settings: with a socket for rounds.
        rank: gives the rank of tensor parallelism.
        ranks: gives how many there are.
    """

    def __init__(self, settings: Settings, rank: Callable[[], int], ranks: Callable[[], int]) -> None:
        self.safe = Failsafe("telling of rounds", "SGLang serves without it")
        self._settings, self._rank, self._ranks = settings, rank, ranks
        self._clock = WallClock()
        self._socket: RoundSocket | None = None
        self._asked = False
        self._turn = self._ended = self._prefill_s = 0.0
        self._running: _Launched | None = None
        self._launched: deque[_Launched] = deque(maxlen=8)

    def around_ingest(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ingest_requests(scheduler), which begins every turn of the scheduler's loop."""
        got = original(*args, **kwargs)
        if self.safe.on:
            more = self.safe.call(self._hold, args[0], lambda: original(*args, **kwargs))
            got += more or []
        return got

    def around_run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around run_batch(scheduler, batch)."""
        self._running = launched = _Launched(self._turn)
        began = self._clock.now()
        result = original(*args, **kwargs)
        launched.run_s = self._clock.now() - began
        self._launched.append(launched)
        return result

    def around_verify(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around verify(worker, batch), which draws up what was drafted and lets the target judge it."""
        if self._running is not None:
            self.safe.call(self._note_plan, args[1] if len(args) > 1 else kwargs["batch"])
        began = self._clock.now()
        result = original(*args, **kwargs)
        if self._running is not None:
            self._running.verify_s = self._clock.now() - began
        return result

    def around_process(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around process_batch_result(scheduler, batch, result)."""
        named = dict(zip(("self", "batch", "result"), args, strict=False)) | kwargs
        batch = named["batch"]
        before = self.safe.call(lambda: [len(request.output_ids) for request in batch.reqs])
        answer = original(*args, **kwargs)
        if before is not None:
            self.safe.call(self._processed, named["self"], batch, named["result"], before)
        return answer

    def _note_plan(self, batch: Any) -> None:
        assert self._running is not None
        verified = batch.spec_info  # while it is: the verification puts something else there
        steps, topk, count = verified.spec_steps, verified.topk, verified.draft_token_num
        self._running.plan = f"{steps}/{topk}/{count}" if steps else "0"

    def _hold(self, scheduler: Any, ingest: Callable[[], list[Any]]) -> list[Any]:
        """In lock-step, take in requests until the next round may go."""
        got: list[Any] = []
        peer = self._open()
        limit = self._settings.lockstep
        if peer is not None and limit:
            if scheduler.enable_overlap and peer.paced:
                peer.refuse("lock-step needs one round at a time; launch SGLang with --disable-overlap-schedule")
            began = self._clock.now()
            while peer.paced and not (scheduler._engine_paused or scheduler.gracefully_exit):
                if peer.left and peer.wanted <= _present(scheduler):
                    break
                if self._clock.now() - began > limit:
                    log.warning("specrl plugin: no leave to go on for %g s; SGLang goes on by itself", limit)
                    peer.refuse(f"no leave to go on came for {limit:g} s (SPECRL_LOCKSTEP), or not all of its requests")
                    break
                peer.wait(_LOOK_S)
                got += ingest()
        self._turn = self._clock.now()
        return got

    def _open(self) -> RoundSocket | None:
        if not self._asked:
            self._asked = True
            if self._rank() == 0:
                if self._settings.lockstep and self._ranks() > 1:
                    raise ValueError(f"lock-step is for one rank, but tensor parallelism has {self._ranks()}")
                assert self._settings.rounds is not None
                self._socket = RoundSocket(
                    self._settings.rounds, _RING, {"lockstep": self._settings.lockstep}, self.safe
                )
                log.warning("specrl plugin: rounds are told on %s", self._settings.rounds)
        return self._socket

    def _processed(self, scheduler: Any, batch: Any, result: Any, before: Sequence[int]) -> None:
        now = self._clock.now()
        if not self._launched:
            return
        launched = self._launched.popleft()
        seconds = now - max(launched.began, self._ended)
        self._ended = now
        mode, peer = batch.forward_mode, self._socket
        if peer is None or not (mode.is_decode() or mode.is_extend()):
            return
        kept = [_kept(request)[count:] for request, count in zip(batch.reqs, before, strict=True)]
        said = {
            "requests": [request.rid for request in batch.reqs],
            "tokens": kept,
            "finished": [request.rid for request in batch.reqs if request.finished()],
        }
        if mode.is_extend():
            self._prefill_s += seconds
            peer.put({"kind": "prefill", **said, "seconds": seconds})
            return
        peer.used()
        verify_s = launched.run_s if launched.verify_s is None else launched.verify_s
        split = str(scheduler.device) == "cpu" and not scheduler.enable_overlap
        draft_s = launched.run_s - verify_s if split else 0.0
        verify_s = verify_s if split else 0.0
        correct = getattr(result, "num_correct_drafts_per_req_cpu", None) if launched.verify_s is not None else None
        contexts = [len(r.origin_input_ids) + count for r, count in zip(batch.reqs, before, strict=True)]
        prefill_s, self._prefill_s = self._prefill_s, 0.0
        peer.put(
            {
                "kind": "round",
                **said,
                "plan": launched.plan,
                "correct": list(correct or [0] * len(kept)),
                "contexts": contexts,
                "draft_s": draft_s,
                "verify_s": verify_s,
                "other_s": max(seconds - draft_s - verify_s, 0.0),
                "prefill_s": prefill_s,
            }
        )


def _kept(request: Any) -> list[int]:
    """What a request has put out; nothing after its end."""
    return list(request.output_ids if request.finished_len is None else request.output_ids[: request.finished_len])


def _present(scheduler: Any) -> frozenset[str]:
    """Requests that wait or run, and have not ended."""
    found = [*scheduler.waiting_queue, *scheduler.running_batch.reqs]
    if scheduler.last_batch is not None:
        found += scheduler.last_batch.reqs
    if scheduler.chunked_req is not None:
        found.append(scheduler.chunked_req)
    return frozenset(request.rid for request in found if not request.finished())
