"""The preference stage's configuration: which loss with which numbers, and against what."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from zephyr_jax.config import choose, positive, require, weighted

DIVERGENCES = ("reverse_kl", "forward_kl", "js")  # or a number: alpha
REFERENCES = ("precomputed", "in_memory", "adapter_off", "synced", "none")
SCORED = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop")
REFERENCE_FREE = ("simpo", "orpo", "cpo", "sft")
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo")


class Option(NamedTuple):
    """A number that only some runs read."""

    default: Any
    holds: Callable[[float], bool]
    rule: str
    readers: tuple[str, ...] = ()  # losses or references, any of them; (): every run


OPTIONS = {
    # The target margin / beta; AlphaPO's bend of the reward, 0 is SimPO
    "simpo_gamma_ratio": Option(0.5, lambda x: 0 <= x < math.inf, "at least 0", ("simpo",)),
    "reward_alpha": Option(0.0, math.isfinite, "finite", ("simpo",)),
    # The weight of tokens by which an answer is the longer one
    "ld_alpha": Option(1.0, lambda x: 0 <= x <= 1, "in [0, 1]"),
    # 1: pairs are weighted by how likely the policy is to write them (WPO)
    "wpo": Option(0, lambda x: x in (0, 1), "0 or 1"),
    # The mean reward's decay, 1: none
    "bco_decay": Option(None, lambda x: 0 <= x <= 1, "in [0, 1]", ("bco_pair",)),
    # TR-DPO: the policy's share in what the reference becomes, and the steps between two moves
    "ref_sync_alpha": Option(0.6, lambda x: 0 < x <= 1, "in (0, 1]", ("synced",)),
    "ref_sync_steps": Option(512, lambda x: x >= 1 and x % 1 == 0, "a whole number", ("synced",)),
    # Where neither is set, the answers of the rarer label weigh as much as the others together
    "desirable_weight": Option(1.0, lambda x: 0 < x < math.inf, "above 0", ("kto",)),
    "undesirable_weight": Option(1.0, lambda x: 0 < x < math.inf, "above 0", ("kto",)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The plain numbers that losses read; a ValueError for one out of its range."""

    # Every loss but sft: strength of the tie to the reference, above 0. ipo calls it tau, sppo_hard
    # 1/eta, nca_pair alpha, hinge 1/delta, orpo lambda.
    beta: float
    # Losses in SMOOTHED: probability that a preference is flipped, in [0, 0.5)
    label_smoothing: float = 0.0
    # Losses in SCORED, of the difference of two scores: what ties the policy to the reference, one
    # of DIVERGENCES, or the alpha in [0, 1] of an alpha-divergence.
    divergence: str | float = "reverse_kl"
    # Numbers that only some runs read: OPTIONS
    options: dict[str, float] = dataclasses.field(
        default_factory=dict, metadata={"options": tuple(OPTIONS)}
    )

    def __post_init__(self) -> None:
        if isinstance(self.divergence, str):
            choose("divergence", self.divergence, DIVERGENCES)
        else:
            require(0 <= self.divergence <= 1, "divergence", self.divergence, "in [0, 1]")
        smoothing = self.label_smoothing
        require(0 < self.beta < math.inf, "beta", self.beta, "above 0 and finite")
        require(0 <= smoothing < 0.5, "label_smoothing", smoothing, "in [0, 0.5)")
        for name, value in self.options.items():
            if name not in OPTIONS:
                near = difflib.get_close_matches(name, OPTIONS, 2, 0.5) or OPTIONS
                meant = f"did you mean {' or '.join(near)}?"
                raise ValueError(f"dpo.options.{name} is no option; {meant}")
            require(OPTIONS[name].holds(value), f"dpo.options.{name}", value, OPTIONS[name].rule)

    def option(self, name: str) -> Any:
        """The value of an option, by default that of OPTIONS."""
        return self.options.get(name, OPTIONS[name].default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig(LossOptions):
    """The preference stage; a config without this section is supervised fine-tuning."""

    reference: str  # one of REFERENCES; docs/preferences.md says what each costs
    max_length: int  # tokens of prompt and longer answer together
    max_prompt_length: int  # what a prompt is cut to (its end kept) where max_length is exceeded
    # One of losses.preference.LOSSES, or weights of several: {"sigmoid": 1.0, "sft": 0.2}
    loss: str | dict[str, float] = "sigmoid"
    # What the policy is held to, where that is not what the run begins with: a model, as `init`
    reference_model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "max_length", "max_prompt_length")
        choose("dpo.reference", self.reference, REFERENCES)
        holds = self.reference != "none" or not self.reference_model
        rule = "left out under dpo.reference=none, which compares with no model"
        require(holds, "dpo.reference_model", self.reference_model, rule)
        longest, rule = self.max_prompt_length, f"below dpo.max_length={self.max_length}"
        require(longest < self.max_length, "dpo.max_prompt_length", longest, rule)
        # A number that neither the losses nor the reference of this run read is refused.
        values: dict[str, Any] = {
            f"options.{name}": (x, OPTIONS[name].readers) for name, x in self.options.items()
        }
        if self.label_smoothing:
            values["label_smoothing"] = self.label_smoothing, SMOOTHED
        if self.divergence != "reverse_kl":
            values["divergence"] = self.divergence, SCORED
            if others := self.loss_weights.keys() - {*SCORED, *REFERENCE_FREE}:
                raise ValueError(
                    f"dpo.divergence={self.divergence!r} leaves in the rewards a term that "
                    f"{', '.join(sorted(others))} does not cancel; use 'reverse_kl'"
                )
        for name, (value, readers) in values.items():
            if readers and not {*readers} & {*self.loss_weights, self.reference}:
                raise ValueError(
                    f"dpo.{name}={value} is read by {', '.join(readers)} alone; this run has "
                    f"dpo.loss={self.loss} and dpo.reference={self.reference}: leave it out"
                )
        of_pairs = self.loss_weights.keys() > {"kto"} or {"wpo", "ld_alpha"} & self.options.keys()
        rule = "kto alone, without wpo and ld_alpha: it learns from single labeled answers"
        require(not (self.labeled and of_pairs), "dpo.loss", self.loss, rule)

    @property
    def loss_weights(self) -> dict[str, float]:
        """The losses and their weights in the sum."""
        return weighted("dpo.loss", self.loss)

    @property
    def labeled(self) -> bool:
        """Whether the run learns from single answers with a label instead of pairs."""
        return "kto" in self.loss_weights
