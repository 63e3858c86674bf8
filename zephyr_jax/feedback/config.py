"""What a round of AI feedback is: which prompts, who answers them, and who rates the answers."""

from __future__ import annotations

import dataclasses
from typing import Any

from zephyr_jax.config import choose, positive, require
from zephyr_jax.evaluation.endpoints import EndpointConfig
from zephyr_jax.inference.sampling import SamplingParams

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
OVERALL = "overall"
# Our own words for the principles of UltraFeedback (Cui et al. 2023, arXiv:2310.01377).
SYSTEM_PROMPTS = {
    "helpfulness": "Solve the task at hand: completely, correctly, in good order, and no longer "
    "than it needs.",
    "honesty": "Be honest about what you know. Where you are unsure or cannot know something, say "
    "so instead of sounding certain.",
    "truthfulness": "State only what is true. Invent no facts, sources or quotations, and correct "
    "a false assumption of the question before you answer it.",
    "verbalized_calibration": "Answer the question, and say in words or as a percentage how "
    "confident you are in each claim that could be wrong.",
}
# What each kind of judge needs.
_JUDGES = {
    "endpoint": ("endpoint", "model"),
    "model": ("model",),
    "implicit_reward": ("model", "reference"),
    "recorded": ("ratings",),
    "function": (),  # of Python, an argument of `collect`
}


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """Which prompts are answered; of a dialogue the first question is one."""

    source: str  # a prepared set ("ultrachat/200k"), a jsonl or parquet file or folder, or a hub id
    data_dir: str = "data"  # where prepared sets are
    split: str = ""  # of a prepared set, or as a hub set's files name it; "": the one that trains
    count: int = 0  # so many, drawn by the seed; 0: all
    decontaminate: tuple[str, ...] = ()  # files of benchmark prompts; see docs/data.md

    def __post_init__(self) -> None:
        require(bool(self.source), "prompts.source", "''", "a set, a file or a hub id")
        require(self.count >= 0, "prompts.count", self.count, "0 (all) or more")


@dataclasses.dataclass(frozen=True)
class AskedConfig:
    """A model that is asked, and how its replies are sampled."""

    model: str = ""  # a workdir, checkpoint, Hugging Face folder, GGUF file or hub id; or its name
    endpoint: str = ""  # one of `endpoints`, which then has the model; "": the model runs here
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0
    price: tuple[float, ...] = ()  # at an endpoint: dollars for a million tokens in and out

    def __post_init__(self) -> None:
        fits = len(self.price) in (0, 2) and min(self.price, default=0) >= 0
        require(fits, "price", self.price, "(dollars in, dollars out) for a million tokens")
        self.sampling()

    def settings(self) -> dict[str, Any]:
        """What is sent to an endpoint with each chat."""
        names = ("model", "temperature", "top_p", "max_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def sampling(self) -> SamplingParams:
        """The same for a model here; a ValueError if a value cannot be."""
        settings = {name: getattr(self, name) for name in ("temperature", "top_p", "seed")}
        return SamplingParams(max_new_tokens=self.max_tokens, **settings)


@dataclasses.dataclass(frozen=True)
class ContestantConfig(AskedConfig):
    """One that answers; the same model with another seed is another one (on-policy samples)."""

    answers: str = ""  # a file of rows with a prompt and a response, or completions of `model`

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.model or self.answers), "a contestant's model", "''", "set, or answers")


@dataclasses.dataclass(frozen=True)
class JudgeConfig(AskedConfig):
    """Who rates the answers to a prompt, and how.

    "endpoint" and "model" are asked; "implicit_reward" is beta times a preference-trained model's
    log-prob less its reference's.
    """

    kind: str = "endpoint"
    reference: str = ""  # of implicit_reward
    beta: float = 0.1  # of implicit_reward
    ratings: str = ""  # of recorded: a file of rated rows, as this command writes them
    aspects: tuple[str, ...] = ASPECTS  # rated from 1 to 5
    overall: bool = True  # and a score from 1 to 10 with a critique
    repeats: int = 1  # every second time in the reverse order; 2 measures the judge
    attempts: int = 3  # until a reply can be read; then its ratings are N/A
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("judge.kind", self.kind, tuple(_JUDGES))
        choose("judge.aspects", self.aspects, ASPECTS)
        positive(self, "repeats", "attempts", "beta")
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
        require("judge" not in self.contestants, "contestants", "judge", "of another name")
        choose("principles", tuple(self.principles), tuple(SYSTEM_PROMPTS))
        above = min(self.principles.values(), default=1.0) > 0
        require(above, "principles", self.principles, "proportions above 0; leave out the others")
        listed = ", ".join(self.endpoints) or "it is empty"
        for name, one in self.at_endpoints.items():
            fits = one.endpoint in self.endpoints
            require(fits, f"{name}.endpoint", one.endpoint, f"one of `endpoints` ({listed})")

    @property
    def at_endpoints(self) -> dict[str, AskedConfig]:
        """Who is asked at an endpoint, by the contestant's name or "judge"."""
        everyone = {**self.contestants, "judge": self.judge}
        return {name: one for name, one in everyone.items() if one.endpoint}
