"""The optimizer's configuration: which updates, at which rates."""

from __future__ import annotations

import dataclasses

from zephyr_jax.config import choose, positive, require, weighted

OPTIMIZERS = ("adamw", "adam", "nadamw", "adafactor", "lion", "muon", "rmsprop", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "wsd")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optimizer with linear warm-up of its rate, then a schedule."""

    name: str  # one of OPTIMIZERS: optax's; "rmsprop" is torch's, without momentum
    peak_lr: float  # after the warm-up
    # One of SCHEDULES; {"wsd": 0.2} falls over the last 20% of all steps, "wsd" over 10%
    schedule: str | dict[str, float]
    warmup_ratio: float  # of all steps; ceil, as Hugging Face's Trainer rounds
    # Shares of the old mean (sgd's and muon's momentum; rmsprop has none: 0) and of the old mean
    # square in the new, torch's alpha for rmsprop, nothing for sgd; for adafactor the second is the
    # exponent of that share's growth, 1 - t^-b2
    betas: tuple[float, ...]
    eps: float  # added to the root of the mean square; for adafactor to the square: 1e-30
    weight_decay: float  # decoupled; adam, rmsprop and sgd have none: 0
    max_grad_norm: float  # of the averaged gradient, before the optimizer sees it; inf: none
    mu_dtype: str = "float32"  # of the first moment; "bfloat16" halves it
    offload_optimizer: bool = False  # moments wait in pinned host memory between updates
    warmup_from_zero: bool = False  # the first update of a warm-up has rate 0, as Hugging Face's

    def __post_init__(self) -> None:
        choose("optim.name", self.name, OPTIMIZERS)
        choose("optim.mu_dtype", self.mu_dtype, ("float32", "bfloat16"))
        positive(self, "peak_lr", "eps", "max_grad_norm")
        if self.name == "adafactor" and self.eps > 1e-16:
            raise ValueError(
                f"optim.eps={self.eps} is added to squares by adafactor and would drown them; "
                "use 1e-30"
            )
        pair = "two numbers, as (0.9, 0.999)"
        require(len(self.betas) == 2, "optim.betas", self.betas, pair)
        unused = self.betas[0] or self.weight_decay or self.mu_dtype != "float32"
        if self.name == "rmsprop" and unused:
            raise ValueError(
                f"optim.name=rmsprop has neither momentum nor weight decay: optim.betas[0]="
                f"{self.betas[0]} and optim.weight_decay={self.weight_decay} must be 0; or "
                "take adamw"
            )
        if self.name in ("adam", "sgd"):
            rule = f"0: {self.name} has none; or take adamw"
            require(not self.weight_decay, "optim.weight_decay", self.weight_decay, rule)
        require(0 <= self.warmup_ratio <= 1, "optim.warmup_ratio", self.warmup_ratio, "in [0, 1]")
        name, share = self.schedule_and_share
        choose("optim.schedule", name, SCHEDULES)
        holds = share <= 1 and (name == "wsd" or isinstance(self.schedule, str))
        require(holds, "optim.schedule", self.schedule, "a name, or {'wsd': SHARE} with SHARE <= 1")
        if name == "constant" and self.warmup_ratio:
            raise ValueError(
                f"optim.schedule=constant has no warm-up, and optim.warmup_ratio="
                f"{self.warmup_ratio}; set that to 0, or write constant_with_warmup"
            )

    @property
    def schedule_and_share(self) -> tuple[str, float]:
        """The schedule's name, and over which share of all steps wsd falls."""
        if isinstance(self.schedule, str):
            return self.schedule, 0.1
        return next(iter(weighted("optim.schedule", self.schedule).items()))
