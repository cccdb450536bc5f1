"""Plain decoding on a server of its own, without a draft: what every speedup is counted against.

It stands on the same device and takes turns with the one that speculates: that one waits for leave meanwhile, and this
one sleeps otherwise. It schedules as SGLang does by default.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from statistics import median
from threading import Thread
from typing import ClassVar

from specrl.core.round import PlainSample
from specrl.sglang.client.errors import ServerError, ServerFailed, ServerSilent
from specrl.sglang.client.launch import ROUNDS, Server
from specrl.sglang.client.plugin_client import Rounds

SKIPPED = 2  # steps that find their feet first


class PlainServer:
    """Times steps of plain decoding.

    Args:
        server: without speculation, with the plugin telling of its rounds.
        timeout_s: for a sample.
    """

    _STEPS: ClassVar[int] = 4  # of a sample

    def __init__(self, server: Server, timeout_s: float = 60.0) -> None:
        self.server, self._timeout_s = server, timeout_s

    def measure(self, texts: Sequence[Sequence[int]]) -> PlainSample:
        """What some steps usually take that continue these texts together.

        Args:
            texts: token ids of each live request.

        Raises:
            ServerError: the server did not decode them together, or not at all.
        """
        contexts = [len(text) for text in texts]
        usual = self._usual([step.seconds for step in self.steps(texts, self._STEPS)])
        return PlainSample(len(texts), sum(contexts) / len(contexts), usual)

    @staticmethod
    def _usual(seconds: Sequence[float]) -> float:
        """What a sample is, of its steps."""
        return median(seconds)

    def steps(self, texts: Sequence[Sequence[int]], count: int) -> list[PlainSample]:
        """Steps that continue these texts together, one after another.

        Args:
            texts: token ids of each live request.
            count: steps wanted; where requests join one by one, there may be fewer, but there is one.

        Raises:
            ServerError: the server did not decode them together, or not at all.
        """
        path = self.server.socket(ROUNDS)
        if path is None:
            raise ServerFailed(
                "the server without speculation must tell of its rounds, but its plugin is off; see its log"
            )
        failed: list[ServerError] = []
        rids = [f"plain-{secrets.token_hex(4)}-{index}" for index in range(len(texts))]
        rounds = Rounds(path, lambda: self._check(failed), self._timeout_s)
        asking = Thread(target=self._ask, args=(texts, rids, count, failed), name="specrl-plain", daemon=True)
        asking.start()
        try:
            taken: list[PlainSample] = []
            ended: set[str] = set()
            while ended < set(rids):
                said = rounds.next()
                ended |= set(said["finished"]) & set(rids)
                if said["kind"] == "round" and len(said["requests"]) == len(rids):
                    seconds = said["draft_s"] + said["verify_s"] + said["other_s"]
                    taken.append(PlainSample(len(rids), sum(said["contexts"]) / len(rids), seconds))
        finally:
            rounds.close()
        asking.join(self._timeout_s)
        if asking.is_alive():
            raise ServerSilent(f"{self.server.client.url} must answer within {self._timeout_s:g} s; see its log")
        kept = taken[SKIPPED:]
        if not kept:
            raise ServerFailed(
                f"the server without speculation must decode {len(texts)} requests at once, but did not; raise its "
                "--max-running-requests or --max-total-tokens"
            )
        return kept

    def close(self) -> None:
        """End the server if it is ours; idempotent."""
        self.server.close()

    def _check(self, failed: Sequence[ServerError]) -> None:
        self.server.check()
        if failed:
            raise failed[0]

    def _ask(self, texts: Sequence[Sequence[int]], rids: Sequence[str], count: int, failed: list[ServerError]) -> None:
        sampling = {"temperature": 0.0, "max_new_tokens": SKIPPED + count + 1, "ignore_eos": True}
        body = {"rid": list(rids), "input_ids": [list(text) for text in texts], "sampling_params": sampling}
        try:
            self.server.client.post("/generate", body, timeout_s=self._timeout_s)
        except ServerError as error:
            failed.append(error)
