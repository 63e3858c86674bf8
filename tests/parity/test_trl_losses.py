"""The preference losses beside TRL's own code, value and gradient, on given log-probs.

TRL's methods run on a stand-in for the trainer, with a stand-in for the model that answers the
log-probs. Live, against the installed TRL; skips where it is absent.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zephyr_jax.config.preference import LossOptions
from zephyr_jax.losses.pairs import PairLogps, ld_logps, wpo_weights
from zephyr_jax.losses.preference import DISCOPOP_TAU, LOSSES, combined, kto

torch = pytest.importorskip("torch", reason="`make parity` installs torch")
pytest.importorskip("trl", reason="TRL is not installed")
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL's DPOTrainer is absent")
kto_trainer = pytest.importorskip("trl.trainer.kto_trainer", reason="TRL's KTOTrainer is absent")
cpo_trainer = pytest.importorskip(
    "trl.experimental.cpo.cpo_trainer", reason="TRL's CPOTrainer is absent"
)
orpo_trainer = pytest.importorskip(
    "trl.experimental.orpo.orpo_trainer", reason="TRL's ORPOTrainer is absent"
)
pytestmark = pytest.mark.parity

# Float32 against float32: the last digits of sums in another order.
VALUE = {"rtol": 1e-5, "atol": 1e-6}
GRADIENT = {"rtol": 1e-4, "atol": 1e-6}
ACCELERATOR = types.SimpleNamespace(
    device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
)
DIVERGENCE = {"forward_kl": "forward_kl", "js": "js_divergence", 0.3: "alpha_divergence"}
OF_SCORES = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop")
DPO = {
    "sigmoid": {"beta": 0.3},
    "sigmoid_norm": {"beta": 5.0},
    "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "hinge": {"beta": 0.15},
    "ipo": {"beta": 0.4},
    "exo_pair": {"beta": 0.3, "label_smoothing": 1e-3},
    "nca_pair": {"beta": 0.2},
    "bco_pair": {"beta": 0.2},
    "apo_zero": {"beta": 0.2},
    "apo_down": {"beta": 0.2},
    "sppo_hard": {"beta": 0.05},
    "discopop": {"beta": 0.3},
    "aot": {"beta": 0.3, "label_smoothing": 0.1},
    "aot_unpaired": {"beta": 0.3, "label_smoothing": 0.1},
}


class Answers:
    """Log-probs of the tokens of 7 chosen and 7 rejected answers, after a prompt of one token."""

    def __init__(self, spread=4.0, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(1, 12, 14)
        self.mask = np.arange(1, 13)[None] <= self.lengths[:, None]
        logps = -rng.uniform(0.1, 2.0, self.mask.shape)
        self.logps = np.float32(np.where(self.mask, logps, 0))
        self.squares = np.float32(np.where(self.mask, logps - rng.normal(0, 0.2, logps.shape), 0))
        self.refs = np.float32(self.logps.sum(1) + rng.normal(0, spread, 14))

    def pairs(self, logps=None):
        logps = self.logps.sum(1) if logps is None else logps
        return PairLogps(
            *jnp.split(jnp.asarray(logps), 2),
            *jnp.split(jnp.asarray(self.refs), 2),
            *jnp.split(jnp.asarray(self.lengths, jnp.float32), 2),
        )


def trl_dpo(answers, names, options, *, at=None, ld_alpha=None, weighted=False, shares=None):
    """TRL's loss of the pairs `at` (None: all), and its slope by the first token of each answer.

    The slope by a token is the slope by an answer's sum, except in `ld_alpha`, where the first
    token belongs to what is shared.
    """
    at = np.arange(7) if at is None else np.asarray(at)
    rows = np.concatenate([at, at + 7])
    mask = torch.tensor(answers.mask[rows], dtype=torch.long)
    logps = torch.tensor(answers.logps[rows], requires_grad=True)
    zeros = torch.zeros_like(logps)
    outputs = types.SimpleNamespace(
        log_probs=logps,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=torch.tensor(answers.squares[rows]),
    )
    args = types.SimpleNamespace(discopop_tau=DISCOPOP_TAU)
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        args=args,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=ld_alpha,
        f_divergence_type=DIVERGENCE.get(options.divergence, options.divergence),
        f_alpha_divergence_coef=0.7,
        loss_types=names,
        loss_weights=shares or [1.0] * len(names),
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        use_weighting=weighted,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.ones(len(rows), 13, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), mask], 1),
        "ref_chosen_logps": torch.tensor(answers.refs[at]),
        "ref_rejected_logps": torch.tensor(answers.refs[at + 7]),
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.item(), logps.grad[:, 0].numpy()


def ours(loss, pairs, options):
    """Losses, and the slopes of their sum by chosen and rejected log-probs, one behind another."""

    def total(chosen, rejected):
        weights = jnp.ones_like(chosen)
        losses = loss(pairs._replace(chosen=chosen, rejected=rejected), options, weights)
        return losses.sum(), losses

    slopes, losses = jax.grad(total, (0, 1), has_aux=True)(pairs.chosen, pairs.rejected)
    return np.asarray(losses), np.concatenate(slopes)


def each_pair(answers, name, options, **more):
    """TRL's losses and slopes of each pair as a batch of its own, in the order of `ours`."""
    losses, slopes = zip(
        *(trl_dpo(answers, [name], options, at=[k], **more) for k in range(7)), strict=True
    )
    return np.array(losses), np.stack(slopes).T.ravel()


@pytest.mark.parametrize("name", [name for name in DPO if not name.startswith("aot")])
def test_losses_of_single_pairs(name):
    answers, options = Answers(), LossOptions(**DPO[name])
    got, slopes = ours(LOSSES[name], answers.pairs(), options)
    want, their_slopes = each_pair(answers, name, options)
    np.testing.assert_allclose(got, want, **VALUE)
    np.testing.assert_allclose(slopes, their_slopes, **GRADIENT)


@pytest.mark.parametrize("name", OF_SCORES)
@pytest.mark.parametrize("divergence", DIVERGENCE)
def test_divergences(name, divergence):
    answers = Answers(spread=1.0)
    options = LossOptions(**DPO[name], divergence=divergence)
    got, slopes = ours(LOSSES[name], answers.pairs(), options)
    want, their_slopes = each_pair(answers, name, options)
    np.testing.assert_allclose(got, want, **VALUE)
    np.testing.assert_allclose(slopes, their_slopes, **GRADIENT)


@pytest.mark.parametrize("name", DPO)
def test_means_of_batches(name):
    answers, options = Answers(), LossOptions(**DPO[name])
    got, slopes = ours(LOSSES[name], answers.pairs(), options)
    want, their_slopes = trl_dpo(answers, [name], options)
    np.testing.assert_allclose(got.mean(), want, **VALUE)
    np.testing.assert_allclose(slopes / 7, their_slopes, **GRADIENT)


def test_trl_has_no_loss_that_is_not_here():
    """`loss_type` of its configuration, except what its table of losses does not know either."""
    metadata = dpo_trainer.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {word for word in metadata.replace("`", "'").split("'") if word in LOSSES}
    listed = metadata.split("values are: ")[1].split(". If")[0]
    theirs = {word.strip("`' ") for word in listed.split(",")}
    assert theirs == named == {*DPO, "sft"}


def test_sft_is_each_pairs_mean_where_theirs_is_the_tokens():
    answers, options = Answers(), LossOptions(beta=0.1)
    got, _ = ours(LOSSES["sft"], answers.pairs(), options)
    want, _ = each_pair(answers, "sft", options)
    np.testing.assert_allclose(got, want, **VALUE)
    batch, _ = trl_dpo(answers, ["sft"], options)
    np.testing.assert_allclose(np.average(got, weights=answers.lengths[:7]), batch, **VALUE)
    assert abs(got.mean() - batch) > 1e-3  # the conventions do differ


def test_combined():
    answers, options = Answers(), LossOptions(beta=0.3)
    shares = {"sigmoid": 0.8, "bco_pair": 0.2, "aot": 0.4}
    got, slopes = ours(combined(shares), answers.pairs(), options)
    want, their_slopes = trl_dpo(answers, list(shares), options, shares=list(shares.values()))
    np.testing.assert_allclose(got.mean(), want, **VALUE)
    np.testing.assert_allclose(slopes / 7, their_slopes, **GRADIENT)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_ld_logps(alpha):
    answers, options = Answers(), LossOptions(beta=0.3)
    shorter = np.tile(np.minimum(*np.split(answers.lengths, 2)), 2)
    shared = np.arange(1, 13)[None] <= shorter[:, None]
    sums = [np.where(m, answers.logps, 0).sum(1) for m in (shared, ~shared)]
    pairs = answers.pairs(ld_logps(*sums, alpha))
    got, slopes = ours(LOSSES["sigmoid"], pairs, options)
    want, their_slopes = each_pair(answers, "sigmoid", options, ld_alpha=alpha)
    np.testing.assert_allclose(got, want, **VALUE)
    np.testing.assert_allclose(slopes, their_slopes, **GRADIENT)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sppo_hard"])
def test_wpo_weights(name):
    answers, options = Answers(), LossOptions(**DPO[name])
    pairs = answers.pairs()
    aligned, lengths = (answers.logps - answers.squares).sum(1), np.float32(answers.lengths)
    weights = wpo_weights(aligned.reshape(2, 7).T, lengths.reshape(2, 7).T)
    got, slopes = ours(LOSSES[name], pairs, options)
    want, their_slopes = each_pair(answers, name, options, weighted=True)
    np.testing.assert_allclose(got * weights, want, **VALUE)
    np.testing.assert_allclose(slopes * np.tile(weights, 2), their_slopes, **GRADIENT)


def trl_kto(answers, k, good, loss_type, kl, options):
    """TRL's loss of answer k as a batch of its own, and its slope by the answer's sum."""
    logps = torch.tensor(answers.logps[k : k + 1], requires_grad=True)
    zeros = torch.zeros_like(logps)
    outputs = types.SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        _compute_kl_logps=lambda *_: torch.tensor([kl - 3.0]),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        **options,
    )
    batch = {
        "input_ids": torch.ones(1, 13, dtype=torch.long),
        "completion_mask": torch.tensor(np.int64([[0, *answers.mask[k]]])),
        "label": torch.tensor([bool(good)]),
        "ref_logps": torch.tensor(answers.refs[k : k + 1]),
        "ref_KL_logps": torch.tensor([-3.0]),
    }
    loss = kto_trainer.KTOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)
    loss.backward()
    return loss.item(), logps.grad[0, 0].item()


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl", [2.5, -1.0])
def test_kto(loss_type, kl):
    """One answer at a time; `apo_zero_unpaired` is KTO with an estimate of 0."""
    answers, good = Answers(), np.arange(14) % 3 > 0
    options = {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    theirs = [trl_kto(answers, k, good[k], loss_type, kl, options) for k in range(14)]

    def total(logps):
        estimate = kl if loss_type == "kto" else 0.0
        losses = kto(logps, jnp.asarray(answers.refs), jnp.asarray(good), estimate, **options)
        return losses.sum(), losses

    slopes, got = jax.grad(total, has_aux=True)(jnp.asarray(answers.logps.sum(1)))
    want, their_slopes = zip(*theirs, strict=True)
    np.testing.assert_allclose(got, want, **VALUE)
    np.testing.assert_allclose(slopes, their_slopes, **GRADIENT)


def reference_free(trainer_class, answers, mean, **settings):
    """TRL's losses of each pair and its slopes by the sums, from a forward pass that is given."""
    losses, slopes = [], []
    for k in range(7):
        sums = torch.tensor(answers.logps.sum(1)[[k, k + 7]], requires_grad=True)
        lengths = torch.tensor(answers.lengths[[k, k + 7]])
        chosen, rejected = (sums / lengths if mean else sums).split(1)
        nll = -sums[0] / lengths[0]  # of the answer, as everywhere here
        forward = (chosen, rejected, torch.zeros(1), torch.zeros(1), nll)
        trainer = types.SimpleNamespace(
            accelerator=ACCELERATOR,
            aux_loss_enabled=False,
            concatenated_forward=lambda *_, forward=forward: forward,
            **settings,
        )
        for method in ("cpo_loss", "odds_ratio_loss"):
            if hasattr(trainer_class, method):
                setattr(trainer, method, types.MethodType(getattr(trainer_class, method), trainer))
        loss, _ = trainer_class.get_batch_loss_metrics(trainer, None, {})
        loss.backward()
        losses.append(loss.item())
        slopes.append(sums.grad.numpy())
    return np.array(losses), np.stack(slopes).T.ravel()


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_simpo_and_alphapo(alpha, sft_weight):
    options = LossOptions(beta=2.5, simpo_gamma_ratio=0.3, reward_alpha=alpha, label_smoothing=0.1)
    answers, shares = Answers(), {"simpo": 1.0, "sft": sft_weight}
    got, slopes = ours(combined(shares), answers.pairs(), options)
    want, their_slopes = reference_free(
        cpo_trainer.CPOTrainer,
        answers,
        True,
        loss_type="simpo",
        alpha=alpha,
        beta=2.5,
        simpo_gamma=0.75,
        label_smoothing=0.1,
        cpo_alpha=sft_weight,
    )
    np.testing.assert_allclose(got, want, **VALUE)
    np.testing.assert_allclose(slopes, their_slopes, **GRADIENT)


def test_cpo():
    answers, options = Answers(), LossOptions(beta=0.2, label_smoothing=0.1)
    got, slopes = ours(LOSSES["cpo"], answers.pairs(), options)
    settings = {"loss_type": "sigmoid", "alpha": 0.0, "beta": 0.2, "label_smoothing": 0.1}
    trainer = cpo_trainer.CPOTrainer
    want, their_slopes = reference_free(trainer, answers, False, cpo_alpha=1.0, **settings)
    np.testing.assert_allclose(got, want, **VALUE)
    np.testing.assert_allclose(slopes, their_slopes, **GRADIENT)


def test_orpo():
    answers = Answers()
    got, slopes = ours(LOSSES["orpo"], answers.pairs(), LossOptions(beta=0.7))
    want, their_slopes = reference_free(orpo_trainer.ORPOTrainer, answers, True, beta=0.7)
    np.testing.assert_allclose(got, want, **VALUE)
    np.testing.assert_allclose(slopes, their_slopes, **GRADIENT)
