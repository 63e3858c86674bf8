"""What a round of AI feedback is: which prompts, who answers them, and who rates the answers."""

from __future__ import annotations

import dataclasses

from zephyr_jax.config import choose, positive, require
from zephyr_jax.evaluation.endpoints import EndpointConfig

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
OVERALL = "overall"
PRINCIPLES = ("helpfulness", "honesty", "truthfulness", "verbalized_calibration")
# What each kind of judge needs.
_JUDGES = {
    "endpoint": ("endpoint", "model"),
    "model": ("model",),
    "implicit_reward": ("model", "reference"),
    "recorded": ("ratings",),
}


def require_price(price: tuple[float, ...]) -> None:
    """Refuses a price that is not two amounts."""
    fits = not price or (len(price) == 2 and min(price) >= 0)
    require(fits, "price", price, "(dollars in, dollars out) for a million tokens")


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """Which prompts are answered; of a dialogue the first question is one."""

    source: str  # a prepared set ("ultrachat/200k"), a jsonl or parquet file or folder, or a hub id
    data_dir: str = "data"  # where prepared sets are
    split: str = ""  # of a prepared set; "": the one that trains
    count: int = 0  # so many, drawn by the seed; 0: all
    decontaminate: tuple[str, ...] = ()  # files of benchmark prompts; see docs/data.md

    def __post_init__(self) -> None:
        require(bool(self.source), "prompts.source", self.source, "a set, a file or a hub id")
        require(self.count >= 0, "prompts.count", self.count, "0 (all) or more")


@dataclasses.dataclass(frozen=True)
class ContestantConfig:
    """One that answers: a model here, a model at an endpoint, or a file of recorded answers."""

    model: str = ""  # a workdir, checkpoint, Hugging Face folder, GGUF file or hub id; or its name
    endpoint: str = ""  # one of `endpoints`, which then has the model; "": the model runs here
    answers: str = ""  # a jsonl file whose rows have a prompt and a response
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0  # another seed is another contestant: on-policy samples of one model
    price: tuple[float, ...] = ()  # at an endpoint: dollars for a million tokens in and out

    def __post_init__(self) -> None:
        positive(self, "max_tokens")
        require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2**32 - 1")
        require_price(self.price)
        if bool(self.model) == bool(self.answers):
            raise ValueError(
                f"a contestant has model={self.model!r} and answers={self.answers!r}; name a "
                "model, or a file of recorded answers"
            )


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Who rates the answers to a prompt, and how."""

    # "endpoint" and "model" are asked; "implicit_reward" is beta times the gain of a preference
    # model's log-prob over its reference; "recorded" looks the ratings up in a file
    kind: str
    model: str = ""  # as a contestant's; of implicit_reward the preference-trained one
    endpoint: str = ""
    reference: str = ""  # of implicit_reward
    beta: float = 0.1  # of implicit_reward
    ratings: str = ""  # of recorded: a jsonl file of rated rows, as this command writes them
    aspects: tuple[str, ...] = ASPECTS  # rated from 1 to 5
    overall: bool = True  # and a score from 1 to 10 with a critique
    repeats: int = 1  # every second time in the reverse order; 2 measures the judge
    attempts: int = 3  # until a reply can be read; then its ratings are N/A
    temperature: float = 0.0
    max_tokens: int = 1024
    price: tuple[float, ...] = ()  # as a contestant's

    def __post_init__(self) -> None:
        choose("judge.kind", self.kind, tuple(_JUDGES))
        choose("judge.aspects", self.aspects, ASPECTS)
        positive(self, "repeats", "attempts", "max_tokens", "beta")
        require(self.temperature >= 0, "judge.temperature", self.temperature, "0 or more")
        require_price(self.price)
        for name in _JUDGES[self.kind]:
            require(bool(getattr(self, name)), f"judge.{name}", "''", f"set for kind {self.kind}")
        require(bool(self.forms), "judge.aspects", "()", "some aspects where overall is False")

    @property
    def forms(self) -> tuple[str, ...]:
        """What is asked for: the aspects, and "overall"."""
        return (*self.aspects, OVERALL) if self.overall else self.aspects


@dataclasses.dataclass(frozen=True)
class FeedbackConfig:
    """One round: every contestant answers every prompt, and the judge rates all answers to it."""

    name: str
    seed: int  # of the prompts that are drawn, the principles and the orders of the answers
    prompts: PromptsConfig
    contestants: dict[str, ContestantConfig]  # by the names that they have in the rows
    judge: JudgeConfig
    endpoints: dict[str, EndpointConfig] = dataclasses.field(default_factory=dict)
    # Proportions of the principles under which answers are given, each a system prompt; {}: none
    principles: dict[str, float] = dataclasses.field(default_factory=dict)
    batch_size: int = 16  # prompts that a model here answers at once

    def __post_init__(self) -> None:
        positive(self, "batch_size")
        require(bool(self.contestants), "contestants", "{}", "at least one, four as a rule")
        choose("principles", tuple(self.principles), PRINCIPLES)
        for name, share in self.principles.items():
            require(share > 0, f"principles.{name}", share, "above 0; leave it out for none")
        named = {f"contestants.{name}": one.endpoint for name, one in self.contestants.items()}
        for place, endpoint in (named | {"judge": self.judge.endpoint}).items():
            fits = not endpoint or endpoint in self.endpoints
            listed = ", ".join(self.endpoints) or "it is empty"
            require(fits, f"{place}.endpoint", endpoint, f"one of `endpoints` ({listed})")
