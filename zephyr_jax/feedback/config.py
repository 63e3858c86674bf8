"""What a round of AI feedback is: which prompts, who answers them, and who rates the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from zephyr_jax.config.checks import choose, positive, require
from zephyr_jax.config.run import load_config

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
OVERALL = "overall"
PRINCIPLES = ("helpfulness", "honesty", "truthfulness", "verbalized_calibration")
JUDGES = ("endpoint", "model", "implicit_reward", "recorded")


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """Which prompts are answered; only the first question of a dialogue is one."""

    source: str  # a prepared set ("ultrachat/200k"), a jsonl or parquet file or folder, or a hub id
    data_dir: str = "data"  # where prepared sets are
    split: str = ""  # of a prepared set; "": the one that trains
    count: int = 0  # so many, drawn by the seed; 0: all
    decontaminate: tuple[str, ...] = ()  # files of benchmark prompts; see docs/data.md

    def __post_init__(self) -> None:
        require(bool(self.source), "prompts.source", self.source, "a set, a file or a hub id")
        require(self.count >= 0, "prompts.count", self.count, "0 (all) or more")


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """A server with OpenAI's interface, and how hard it may be driven."""

    url: str  # such as http://localhost:8000/v1
    key_variable: str = ""  # the environment variable that holds the API key; "": none is sent
    concurrency: int = 8  # requests in flight
    requests_per_minute: int = 0  # 0: no limit
    timeout: float = 120.0  # seconds to wait for one reply
    retries: int = 5  # of one request, by the openai client, which honors Retry-After
    json_schema: bool = True  # judges reply as JSON by a schema; False: in lines of text
    # Dollars for a million prompt tokens and for a million reply tokens, by model
    prices: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        positive(self, "concurrency", "timeout")
        require(self.url.startswith(("http://", "https://")), "url", self.url, "http(s)://...")
        for name in ("requests_per_minute", "retries"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for model, price in self.prices.items():
            fits = len(price) == 2 and min(price) >= 0
            require(fits, f"prices.{model}", price, "(dollars in, dollars out), not negative")


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

    def __post_init__(self) -> None:
        positive(self, "max_tokens")
        require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
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

    def __post_init__(self) -> None:
        choose("judge.kind", self.kind, JUDGES)
        choose("judge.aspects", self.aspects, ASPECTS)
        positive(self, "repeats", "attempts", "max_tokens", "beta")
        needed = {
            "endpoint": ("endpoint", "model"),
            "model": ("model",),
            "implicit_reward": ("model", "reference"),
            "recorded": ("ratings",),
        }[self.kind]
        for name in needed:
            require(bool(getattr(self, name)), f"judge.{name}", "", f"set for kind {self.kind}")
        if not self.aspects and not self.overall:
            raise ValueError("judge.aspects is empty and judge.overall false: nothing is rated")

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
        asked = {f"contestants.{name}": one.endpoint for name, one in self.contestants.items()}
        for place, endpoint in (asked | {"judge": self.judge.endpoint}).items():
            if endpoint and endpoint not in self.endpoints:
                known = ", ".join(self.endpoints) or "none"
                raise ValueError(f"{place}.endpoint={endpoint!r} is none of `endpoints` ({known})")


def load_feedback_config(name: str, overrides: Sequence[str] = ()) -> FeedbackConfig:
    """The round that a config file describes; errors as those of `load_config`."""
    return load_config(name, overrides, FeedbackConfig)
