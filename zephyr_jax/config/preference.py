"""The preference stage's configuration: which loss with which numbers, and against what."""

from __future__ import annotations

import dataclasses
import math

from zephyr_jax.config.checks import choose, positive, require, weighted

DIVERGENCES = ("reverse_kl", "forward_kl", "js")  # or a number: alpha
REFERENCES = ("precomputed", "in_memory", "adapter_off", "synced", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The plain numbers that losses read; a loss ignores those that do not name it.

    Raises a ValueError for a value out of its range.
    """

    # Every loss but sft: strength of the tie to the reference, above 0. ipo calls it tau, sppo_hard
    # 1/eta, nca_pair alpha, hinge 1/delta, orpo lambda.
    beta: float
    # sigmoid, robust, exo_pair, aot, aot_unpaired, simpo, cpo: probability that a preference is
    # flipped, in [0, 0.5)
    label_smoothing: float = 0.0
    # Losses of the difference of two scores: what ties the policy to the reference, one of
    # DIVERGENCES, or the alpha in [0, 1] of an alpha-divergence. Other losses refuse all but the
    # first.
    divergence: str | float = "reverse_kl"
    simpo_gamma_ratio: float = 0.5  # simpo: target margin / beta, at least 0
    reward_alpha: float = 0.0  # simpo: AlphaPO's bend of the reward; 0 is SimPO
    ld_alpha: float = 1.0  # weight of the tokens by which an answer is the longer one, in [0, 1]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                require(math.isfinite(value), field.name, value, "a finite number")
        if isinstance(self.divergence, str):
            choose("divergence", self.divergence, DIVERGENCES)
        else:
            require(0 <= self.divergence <= 1, "divergence", self.divergence, "in [0, 1]")
        smoothing, ratio = self.label_smoothing, self.simpo_gamma_ratio
        require(self.beta > 0, "beta", self.beta, "above 0")
        require(0 <= smoothing < 0.5, "label_smoothing", smoothing, "in [0, 0.5)")
        require(ratio >= 0, "simpo_gamma_ratio", ratio, "at least 0")
        require(0 <= self.ld_alpha <= 1, "ld_alpha", self.ld_alpha, "in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig(LossOptions):
    """The preference stage. A config without this section is supervised fine-tuning.

    The fields of `LossOptions` are here too. What has a default may be left out of a config file.
    """

    reference: str  # one of REFERENCES; docs/preferences.md says what each costs
    max_length: int  # tokens of prompt and longer answer together
    max_prompt_length: int  # what a prompt is cut to (its end kept) where max_length is exceeded
    # One of losses.preference.LOSSES, or weights of several: {"sigmoid": 1.0, "sft": 0.2}
    loss: str | dict[str, float] = "sigmoid"
    wpo: bool = False  # pairs weighted by how likely the policy is to write them (WPO)
    bco_decay: float | None = None  # of bco_pair's running mean reward: 1 all pairs; None: no mean
    ref_sync_alpha: float = 0.6  # of the policy in what a "synced" reference becomes (TR-DPO)
    ref_sync_steps: int = 512  # steps between two such moves

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "max_length", "max_prompt_length", "ref_sync_steps")
        choose("dpo.reference", self.reference, REFERENCES)
        weighted("dpo.loss", self.loss)
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"dpo.max_prompt_length={self.max_prompt_length} leaves no room for an answer in "
                f"dpo.max_length={self.max_length}"
            )
        share, decay = self.ref_sync_alpha, self.bco_decay
        require(0 < share <= 1, "dpo.ref_sync_alpha", share, "in (0, 1]")
        holds = decay is None or 0 <= decay <= 1
        require(holds, "dpo.bco_decay", decay, "in [0, 1], or None")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The losses and their weights in the sum."""
        return weighted("dpo.loss", self.loss)
