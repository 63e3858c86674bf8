"""The preference losses in float64 NumPy, each written down from its paper's equation.

A batch is a dict of float64 arrays: `pw`, `pl` are the policy's summed log-probs of chosen and
rejected answers, `rw`, `rl` the reference's, `nw`, `nl` their numbers of tokens. Options are the
papers' own symbols, as keywords. Every oracle gives one loss a pair.
"""

import numpy as np


def log_sigma(x):
    return -np.logaddexp(0.0, -x)


def sigma(x):
    return np.exp(log_sigma(x))


def f_prime(u, divergence):
    """The derivative of f at u, from f-DPO's table, less its value at 1; a number is alpha."""
    if divergence == "reverse_kl":  # f = u log u
        return (np.log(u) + 1) - 1
    if divergence == "forward_kl":  # f = -log u
        return -1 / u + 1
    if divergence == "js":  # f = u log u - (u + 1) log((u + 1) / 2)
        return np.log(2 * u / (1 + u))
    return (1 - u**-divergence) / divergence  # f = (u^(1-a) - (1-a) u - a) / (a (a-1))


def scores(b, divergence="reverse_kl"):
    ratios = np.exp(b["pw"] - b["rw"]), np.exp(b["pl"] - b["rl"])
    return [f_prime(u, divergence) for u in ratios]


def sigmoid(b, beta, epsilon=0.0, **f):
    sw, sl = scores(b, **f)
    r = beta * (sw - sl)
    return -(1 - epsilon) * log_sigma(r) - epsilon * log_sigma(-r)


def sigmoid_norm(b, beta, **f):
    sw, sl = scores(b, **f)
    return -log_sigma(beta * sw / b["nw"] - beta * sl / b["nl"])


def robust(b, beta, epsilon, **f):
    kept = sigmoid(b, beta, **f)
    swapped = dict(b, pw=b["pl"], pl=b["pw"], rw=b["rl"], rl=b["rw"])
    return ((1 - epsilon) * kept - epsilon * sigmoid(swapped, beta, **f)) / (1 - 2 * epsilon)


def hinge(b, beta, **f):
    sw, sl = scores(b, **f)
    return np.maximum(0, 1 - beta * (sw - sl))


def ipo(b, tau, **f):
    sw, sl = scores(b, **f)
    return (sw / b["nw"] - sl / b["nl"] - 1 / (2 * tau)) ** 2


def exo_pair(b, beta, epsilon, **f):
    sw, sl = scores(b, **f)
    policy = np.stack([sigma(beta * (sw - sl)), sigma(beta * (sl - sw))])
    human = np.array([1 - epsilon, epsilon]).reshape(2, *[1] * sw.ndim)
    return (policy * np.log(policy / human)).sum(axis=0)


def nca_pair(b, alpha):
    rw, rl = alpha * (b["pw"] - b["rw"]), alpha * (b["pl"] - b["rl"])
    return -log_sigma(rw) - 0.5 * log_sigma(-rw) - 0.5 * log_sigma(-rl)


def bco_pair(b, beta, delta=0.0):
    rw, rl = beta * (b["pw"] - b["rw"]), beta * (b["pl"] - b["rl"])
    return -log_sigma(rw - delta) - log_sigma(-(rl - delta))


def apo_zero(b, beta):  # the paper's equation, plus 1
    return 1 - sigma(beta * (b["pw"] - b["rw"])) + sigma(beta * (b["pl"] - b["rl"]))


def apo_down(b, beta):  # the paper's equation, plus 1
    rw, rl = beta * (b["pw"] - b["rw"]), beta * (b["pl"] - b["rl"])
    return 1 + sigma(rw) - sigma(rw - rl)


def sppo_hard(b, eta):
    won, lost = b["pw"] - b["rw"], b["pl"] - b["rl"]
    return (won - eta * (1 - 0.5)) ** 2 + (lost - eta * (0 - 0.5)) ** 2


def discopop(b, beta, tau, **f):
    sw, sl = scores(b, **f)
    rho = beta * (sw - sl)
    gate = sigma(rho / tau)
    return (1 - gate) * np.log1p(np.exp(-rho)) + gate * np.exp(-rho)


def by_rank(u, v, beta, epsilon):
    """Losses of equal ranks; each stands where its u came from."""
    out, gap = np.zeros_like(u), beta * (np.sort(u) - np.sort(v))
    out[np.argsort(u)] = -(1 - epsilon) * log_sigma(gap) - epsilon * log_sigma(-gap)
    return out


def aot(b, beta, epsilon=0.0):
    return by_rank(b["pw"] - b["pl"], b["rw"] - b["rl"], beta, epsilon)


def aot_unpaired(b, beta, epsilon=0.0):
    return by_rank(b["pw"] - b["rw"], b["pl"] - b["rl"], beta, epsilon)


def simpo(b, beta, gamma, alpha=0.0, epsilon=0.0):
    aw, al = b["pw"] / b["nw"], b["pl"] / b["nl"]
    if alpha:  # AlphaPO
        aw, al = (1 - np.exp(aw) ** -alpha) / alpha, (1 - np.exp(al) ** -alpha) / alpha
    r = beta * aw - beta * al - gamma
    return -(1 - epsilon) * log_sigma(r) - epsilon * log_sigma(-r)


def orpo(b, lam):
    p = np.exp(b["pw"] / b["nw"]), np.exp(b["pl"] / b["nl"])
    odds = [x / (1 - x) for x in p]
    return -b["pw"] / b["nw"] - lam * log_sigma(np.log(odds[0] / odds[1]))


def cpo(b, beta, weight, epsilon=0.0):
    r = beta * (b["pw"] - b["pl"])
    return -(1 - epsilon) * log_sigma(r) - epsilon * log_sigma(-r) - weight * b["pw"] / b["nw"]


def sft(b):
    return -b["pw"] / b["nw"]


def kto(logps, ref, good, z, beta, lambda_d, lambda_u):
    """lambda_y - v(x, y), answer by answer."""
    out = []
    for log_ratio, is_good in zip(logps - ref, good, strict=True):
        value = log_ratio - max(z, 0.0) if is_good else max(z, 0.0) - log_ratio
        lam = lambda_d if is_good else lambda_u
        out.append(lam - lam * sigma(beta * value))
    return np.array(out)


def wpo_weight(logits, tokens):
    """w(x, y) of one answer, from the logits that predict each of its tokens."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    picked = p[np.arange(len(tokens)), tokens]
    return np.prod(picked / (p**2).sum(-1)) ** (1 / len(tokens))


def gradient(loss, b, name, upstream):
    """d sum(upstream * loss) / d b[name], by central differences of float64."""
    out = np.zeros_like(b[name])
    for at in np.ndindex(out.shape):
        step = np.zeros_like(out)
        step[at] = 1e-5
        up, down = (loss(dict(b, **{name: b[name] + s})) for s in (step, -step))
        out[at] = (upstream * (up - down)).sum() / 2e-5
    return out
