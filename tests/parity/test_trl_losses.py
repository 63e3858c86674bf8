"""Values and gradients of the preference losses against the installed TRL's own code.

TRL's methods run on a stand-in for the trainer, with a stand-in for the model that returns fixed
log-probs.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_preference import CASES, GRADIENT, VALUE

from zephyr_jax.config.preference import REFERENCE_FREE, LossOptions
from zephyr_jax.losses.pairs import PairLogps, ld_logps, wpo_weights
from zephyr_jax.losses.preference import DISCOPOP_TAU, LOSSES, combined

torch = pytest.importorskip("torch", reason="`make parity` installs torch")
pytest.importorskip("trl", reason="`make parity` installs TRL")
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOConfig, DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

pytestmark = pytest.mark.parity
ACCELERATOR = types.SimpleNamespace(
    device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
)
DIVERGENCE = {"forward_kl": "forward_kl", "js": "js_divergence", 0.3: "alpha_divergence"}
PAIRED = {k: v[0] for k, v in CASES.items() if k.split()[0] not in REFERENCE_FREE}
PAIRED.pop("sigmoid smoothed")  # TRL's does not read it


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


def run_trl(compute_loss, answers, rows, inputs, **fields):
    """TRL's loss of these answers, and its slope by the first token of each.

    The slope by a token is the slope by an answer's sum, except in `ld_alpha`, where the first
    token belongs to what is shared. `fields` are the trainer's.
    """
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
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        **fields,
    )
    inputs["input_ids"] = torch.ones(len(rows), 13, dtype=torch.long)
    inputs["completion_mask"] = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), mask], 1)
    loss = compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.item(), logps.grad[:, 0].numpy()


def trl_dpo(answers, names, options, *, at=tuple(range(7)), shares=None, **fields):
    """TRL's loss of the pairs `at`, and its slopes."""
    at = np.asarray(at)
    return run_trl(
        DPOTrainer._compute_loss,
        answers,
        np.concatenate([at, at + 7]),
        {
            "ref_chosen_logps": torch.tensor(answers.refs[at]),
            "ref_rejected_logps": torch.tensor(answers.refs[at + 7]),
        },
        args=types.SimpleNamespace(discopop_tau=DISCOPOP_TAU),
        f_divergence_type=DIVERGENCE.get(options.divergence, options.divergence),
        f_alpha_divergence_coef=0.7,
        loss_types=names,
        loss_weights=shares or [1.0] * len(names),
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        **{"ld_alpha": None, "use_weighting": False, **fields},
    )


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
    pairs = [trl_dpo(answers, [name], options, at=[k], **more) for k in range(7)]
    losses, slopes = zip(*pairs, strict=True)
    return np.array(losses), np.stack(slopes).T.ravel()


def assert_same(ours, theirs):
    """Losses and slopes."""
    np.testing.assert_allclose(ours[0], theirs[0], **VALUE)
    np.testing.assert_allclose(ours[1], theirs[1], **GRADIENT)


@pytest.mark.parametrize("case", [case for case in PAIRED if not case.startswith("aot")])
def test_losses_of_single_pairs(case):
    name, options = case.split()[0], LossOptions(**PAIRED[case])
    answers = Answers(spread=4.0 if case == name else 1.0)
    assert_same(ours(LOSSES[name], answers.pairs(), options), each_pair(answers, name, options))


@pytest.mark.parametrize("name", ["sigmoid", "aot", "aot_unpaired"])
def test_means_of_batches(name):
    answers, options = Answers(), LossOptions(**PAIRED[name])
    losses, slopes = ours(LOSSES[name], answers.pairs(), options)
    assert_same((losses.mean(), slopes / 7), trl_dpo(answers, [name], options))


def test_trl_has_no_loss_that_is_not_here():
    """`loss_type` of its configuration, except what its table of losses does not know either."""
    metadata = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {word for word in metadata.replace("`", "'").split("'") if word in LOSSES}
    listed = metadata.split("values are: ")[1].split(". If")[0]
    theirs = {word.strip("`' ") for word in listed.split(",")}
    assert theirs == named == {*(case.split()[0] for case in PAIRED), "sft"}


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
    losses, slopes = ours(combined(shares), answers.pairs(), options)
    theirs = trl_dpo(answers, list(shares), options, shares=list(shares.values()))
    assert_same((losses.mean(), slopes / 7), theirs)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_ld_logps(alpha):
    answers, options = Answers(), LossOptions(beta=0.3)
    shorter = np.tile(np.minimum(*np.split(answers.lengths, 2)), 2)
    shared = np.arange(1, 13)[None] <= shorter[:, None]
    sums = [np.where(m, answers.logps, 0).sum(1) for m in (shared, ~shared)]
    pairs = answers.pairs(ld_logps(*sums, alpha))
    theirs = each_pair(answers, "sigmoid", options, ld_alpha=alpha)
    assert_same(ours(LOSSES["sigmoid"], pairs, options), theirs)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sppo_hard"])
def test_wpo_weights(name):
    answers, options = Answers(), LossOptions(**PAIRED[name])
    aligned, lengths = (answers.logps - answers.squares).sum(1), np.float32(answers.lengths)
    weights = wpo_weights(aligned.reshape(2, 7).T, lengths.reshape(2, 7).T)
    losses, slopes = ours(LOSSES[name], answers.pairs(), options)
    theirs = each_pair(answers, name, options, use_weighting=True)
    assert_same((losses * weights, slopes * np.tile(weights, 2)), theirs)


def trl_kto(answers, k, good, loss_type, kl, options):
    """TRL's loss of answer k as a batch of its own, and its slope."""
    loss, slopes = run_trl(
        KTOTrainer._compute_loss,
        answers,
        [k],
        {
            "label": torch.tensor([bool(good)]),
            "ref_logps": torch.tensor(answers.refs[k : k + 1]),
            "ref_KL_logps": torch.tensor([-3.0]),
        },
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        _compute_kl_logps=lambda *_: torch.tensor([kl - 3.0]),
        **options,
    )
    return loss, slopes[0]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl", [2.5, -1.0])
def test_kto(loss_type, kl):
    """One answer at a time; `apo_zero_unpaired` is KTO with an estimate of 0."""
    answers, good = Answers(), np.arange(14) % 3 > 0
    options = {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    theirs = [trl_kto(answers, k, good[k], loss_type, kl, options) for k in range(14)]

    def total(logps):
        estimate = kl if loss_type == "kto" else 0.0
        zero = jnp.zeros(14)
        pairs = PairLogps(
            logps, zero, jnp.asarray(answers.refs), zero, zero, zero,
            shift=max(estimate, 0.0), desirable=jnp.asarray(good),
        )  # fmt: skip
        numbers = {k: x for k, x in options.items() if k != "beta"}
        losses = LOSSES["kto"](pairs, LossOptions(beta=0.2, options=numbers), zero)
        return losses.sum(), losses

    slopes, got = jax.grad(total, has_aux=True)(jnp.asarray(answers.logps.sum(1)))
    assert_same((got, slopes), tuple(zip(*theirs, strict=True)))


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


SIMPO = {"beta": 2.5, "label_smoothing": 0.1}
GAMMA = {"simpo_gamma_ratio": 0.3}
TRLS_SIMPO = {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.75, "label_smoothing": 0.1}
TRLS_CPO = {"loss_type": "sigmoid", "alpha": 0.0, "beta": 0.2, "label_smoothing": 0.1}
FREE = {
    "simpo": (
        {"simpo": 1.0},
        {**SIMPO, "options": GAMMA},
        {**TRLS_SIMPO, "alpha": 0.0, "cpo_alpha": 0.0},
    ),
    "alphapo with sft": (
        {"simpo": 1.0, "sft": 0.5},
        {**SIMPO, "options": {**GAMMA, "reward_alpha": 0.25}},
        {**TRLS_SIMPO, "alpha": 0.25, "cpo_alpha": 0.5},
    ),
    "cpo": ({"cpo": 1.0}, {"beta": 0.2, "label_smoothing": 0.1}, {**TRLS_CPO, "cpo_alpha": 1.0}),
    "orpo": ({"orpo": 1.0}, {"beta": 0.7}, {"beta": 0.7}),
}


@pytest.mark.parametrize("case", FREE)
def test_losses_without_a_reference(case):
    shares, options, settings = FREE[case]
    answers, trainer = Answers(), ORPOTrainer if case == "orpo" else CPOTrainer
    theirs = reference_free(trainer, answers, case != "cpo", **settings)
    assert_same(ours(combined(shares), answers.pairs(), LossOptions(**options)), theirs)
