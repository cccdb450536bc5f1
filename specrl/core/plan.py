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
        num_steps: draft forward steps per round (the lookahead γ), at least 0; 0 proposes nothing.
        topk: branches kept per draft step, at least 1; 1 is a chain, more is a tree.
        num_draft_tokens: tokens verified per request, including the last committed token. A chain has
            `num_steps + 1`; a tree has between this and 1 + topk + (num_steps - 1)·topk².
    """

    num_steps: int
    topk: int = 1
    num_draft_tokens: int = 0  # 0: as many as a chain has

    def __post_init__(self) -> None:
        steps, topk = self.num_steps, self.topk
        require(steps >= 0, "num_steps", "at least 0", steps)
        require(topk >= 1, "topk", "at least 1", topk)
        require(topk == 1 or steps > 0, "topk", "1 for num_steps=0", topk)
        if self.num_draft_tokens == 0 and topk == 1:
            object.__setattr__(self, "num_draft_tokens", steps + 1)
        most = steps + 1 if topk == 1 else 1 + topk + (steps - 1) * topk * topk
        rule = f"in [{steps + 1}, {most}] for num_steps={steps}, topk={topk}"
        require(steps + 1 <= self.num_draft_tokens <= most, "num_draft_tokens", rule, self.num_draft_tokens)

    @classmethod
    def parse(cls, text: str | int | Plan) -> Plan:
        """Read '0', '3' or '3/1/4'; raises ValueError if it has another form or is no proposal."""
        if isinstance(text, Plan):
            return text
        match = re.fullmatch(r"\s*(\d+)(?:/(\d+)/(\d*[1-9]\d*))?\s*", str(text))
        if match is None:
            raise ValueError(f"a plan is written {_FORMS}, but got {text!r}")
        return cls(*(int(number) for number in match.groups() if number is not None))

    def __str__(self) -> str:
        return "0" if self.num_steps == 0 else f"{self.num_steps}/{self.topk}/{self.num_draft_tokens}"

    @property
    def is_chain(self) -> bool:
        """Whether every step keeps one branch (plan 0 counts as the empty chain)."""
        return self.topk == 1


def parse_plans(text: str | Sequence[str] | Sequence[Plan]) -> tuple[Plan, ...]:
    """Read a comma-separated list of plans, or a list; raises ValueError if it is empty or repeats a plan."""
    parts: Sequence[str] | Sequence[Plan] = text.split(",") if isinstance(text, str) else text
    plans = tuple(Plan.parse(part) for part in parts)
    require(len(plans) > 0, "plans", "at least one plan, such as '0,1/1/2,3/1/4'", text)
    require(len(set(plans)) == len(plans), "plans", "different", ", ".join(map(str, plans)))
    return plans


def chains_of(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """Return the chains among some plans, ascending by num_steps; raises ValueError if there are none."""
    chains = tuple(sorted(plan for plan in plans if plan.is_chain))
    require(len(chains) > 0, "plans", "at least one chain (topk=1)", ", ".join(map(str, plans)))
    return chains
