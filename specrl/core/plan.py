"""What a round proposes: the speculative decoding plan, in SGLang's terms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from specrl.core.checks import require

PLAIN = "plain"  # plain decoding, in places where a plan or the name of an arm is written
_FORMS = "'0', 'num_steps/topk/num_draft_tokens' (as in '3/1/4') or 'num_steps' alone (a chain)"


@dataclass(frozen=True, slots=True, order=True)
class Plan:
    """One round's proposal. `Plan(0)` proposes nothing; `Plan(3)` is the chain 3/1/4.

    Args:
        num_steps: draft forward steps per round (the lookahead γ); 0 proposes nothing.
        topk: branches kept per draft step; 1 is a chain, more is a tree.
        num_draft_tokens: tokens verified per request, the committed one included. A chain has
            `num_steps + 1`; a tree may have any number up to all its nodes and the committed token.

    Raises:
        ValueError: the three numbers do not describe a proposal.
    """

    num_steps: int
    topk: int = 1
    num_draft_tokens: int = 0  # 0: as many as a chain has

    def __post_init__(self) -> None:
        steps, topk = self.num_steps, self.topk
        require(steps >= 0, "num_steps", "at least 0", steps)
        require(topk >= 1, "topk", "at least 1", topk)
        if self.num_draft_tokens == 0 and topk == 1:
            object.__setattr__(self, "num_draft_tokens", steps + 1)
        tokens = self.num_draft_tokens
        if steps == 0 and (topk, tokens) != (1, 1):
            raise ValueError(f"num_steps=0 proposes nothing, but got topk={topk}, num_draft_tokens={tokens}; write '0'")
        if topk == 1 and tokens != steps + 1:
            raise ValueError(
                f"a chain (topk=1) verifies num_steps + 1 = {steps + 1} tokens, but got num_draft_tokens={tokens}; "
                f"write '{steps}/1/{steps + 1}'"
            )
        most = 1 + topk + (steps - 1) * topk * topk
        if topk > 1 and not steps + 1 <= tokens <= most:
            raise ValueError(
                f"a tree of num_steps={steps}, topk={topk} verifies between {steps + 1} and {most} tokens, "
                f"but got num_draft_tokens={tokens}"
            )

    @classmethod
    def parse(cls, text: str | int | Plan) -> Plan:
        """Read '0', '3' or '3/1/4'.

        Raises:
            ValueError: the text has another form, or its numbers do not describe a proposal.
        """
        if isinstance(text, Plan):
            return text
        match = re.fullmatch(r"\s*(\d+)(?:/(\d+)/(\d+))?\s*", str(text))
        if match is None:
            raise ValueError(f"a plan is written {_FORMS}, but got {text!r}")
        steps, topk, tokens = match.groups()
        if topk is not None and int(tokens) < 1:
            raise ValueError(f"num_draft_tokens must be at least 1, but got {tokens} in {text!r}")
        return cls(int(steps)) if topk is None else cls(int(steps), int(topk), int(tokens))

    def __str__(self) -> str:
        return "0" if self.num_steps == 0 else f"{self.num_steps}/{self.topk}/{self.num_draft_tokens}"

    @property
    def is_chain(self) -> bool:
        """Whether every step keeps one branch (plan 0 counts as the empty chain)."""
        return self.topk == 1


def parse_plans(text: str | Sequence[str] | Sequence[Plan]) -> tuple[Plan, ...]:
    """Read a comma-separated list of plans, or a list of them, without repeats.

    Raises:
        ValueError: the list is empty, names a plan twice, or holds an invalid plan.
    """
    parts: Sequence[str] | Sequence[Plan] = text.split(",") if isinstance(text, str) else text
    plans = tuple(Plan.parse(part) for part in parts)
    if not plans:
        raise ValueError("plans must name at least one plan, but got none; for example '0,1/1/2,3/1/4'")
    twice = sorted({plan for plan in plans if plans.count(plan) > 1})
    if twice:
        raise ValueError(f"plans must differ, but got {', '.join(map(str, twice))} more than once")
    return plans
