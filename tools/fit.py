"""Scaling laws: the loss L(N, D) = E + A / N^alpha + B / D^beta of a model of N parameters after D tokens (Hoffmann et
al. 2022, arXiv:2203.15556). Training takes C = 6 N D FLOPs.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HUBER = 1e-3  # residuals of log L beyond this count linearly (Hoffmann et al., appendix D.3)


class Law(NamedTuple):
    """The constants of a law; E in nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: np.ndarray, D: np.ndarray) -> np.ndarray:
        """The loss of models of N parameters after D tokens."""
        return self.E + self.A * np.float64(N) ** -self.alpha + self.B * np.float64(D) ** -self.beta

    def optimum(self, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The N and D with the smallest loss for C FLOPs; NaN if there are none, as an exponent is not positive."""
        exponent = 1 / (self.alpha + self.beta) if min(self.alpha, self.beta) > 0 else np.nan
        N = np.float64(self.alpha * self.A / (self.beta * self.B)) ** exponent * (C / 6) ** (self.beta * exponent)
        return N, C / (6 * N)


# Hoffmann et al. 2022, as printed, and as Besiroglu et al. 2024 (arXiv:2404.10102) fitted it to their data
PUBLISHED = {"Chinchilla": Law(1.69, 406.4, 410.7, 0.34, 0.28)}
PUBLISHED |= {"Chinchilla, refitted by Epoch": Law(1.8172, 477.84, 2143.9, 0.34731, 0.36718)}


def fit(N: np.ndarray, D: np.ndarray, L: np.ndarray, start: Law | None = None) -> Law:
    """The law with the smallest sum of Huber losses of log L, from many starts or from one; N, D and L are (n,)."""
    x, y, target = (torch.from_numpy(np.log(np.asarray(v, dtype=np.float64))) for v in (N, D, L))
    x0, y0 = x.mean().item(), y.mean().item()  # around the means, the parameters are nearly independent

    def minimize(start: tuple[float, ...]) -> tuple[float, list[float]]:
        """The smallest sum near `start`, and where: logs of the three terms at x0 and y0, and the exponents."""
        p = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        tolerances = dict(tolerance_grad=1e-9, tolerance_change=1e-13)
        lbfgs = torch.optim.LBFGS([p], max_iter=300, history_size=20, line_search_fn="strong_wolfe", **tolerances)

        def closure() -> Tensor:
            a, b, e, alpha, beta = p
            predicted = torch.stack([a - alpha * (x - x0), b - beta * (y - y0), e.expand_as(x)]).logsumexp(0)
            value = 1e3 * F.huber_loss(predicted, target, reduction="sum", delta=HUBER)
            lbfgs.zero_grad()
            value.backward()
            return value

        lbfgs.step(closure)
        return closure().item(), p.tolist()

    if start:
        E, A, B, alpha, beta = start
        starts = [(np.log(A) - alpha * x0, np.log(B) - beta * y0, np.log(E), alpha, beta)]
    else:  # the terms of N and D are a half or a tenth of the mean loss; E is 0.3 or 0.95 of the smallest
        terms, E = np.log([0.5, 0.1]) + target.mean().item(), np.log([0.3, 0.95]) + target.min().item()
        starts = itertools.product(terms, terms, E, (0.2, 0.7), (0.2, 0.7))
    a, b, e, alpha, beta = min(found for found in map(minimize, starts) if np.isfinite(found[0]))[1]
    return Law(*np.exp([e, a + alpha * x0, b + beta * y0]).tolist(), alpha, beta)


def bootstrap(N: np.ndarray, D: np.ndarray, L: np.ndarray, law: Law, n: int = 100, seed: int = 0) -> list[Law]:
    """The laws of n resamples of the runs, with replacement. law: that of all runs, from which each fit starts."""
    rows = np.random.default_rng(seed).integers(len(L), size=(n, len(L)))
    return [fit(N[i], D[i], L[i], law) for i in rows]


def parabolas(N: np.ndarray, D: np.ndarray, L: np.ndarray, n: int = 6) -> list[tuple]:
    """For each of n budgets C: (C, sizes, their losses, coefficients of a parabola in log N through them for
    np.polyval, N of its minimum). A budget is left out if fewer than three sizes have runs around it, or if the minimum
    is not between them. The loss of a size is interpolated between its runs, linearly in the logs of D and L.
    """
    C, found = 6 * N * D, []
    for budget in np.geomspace(C.min(), C.max(), n + 2)[1:-1]:
        points = []
        for size in np.unique(N):
            d, loss = (array[N == size][np.argsort(D[N == size])] for array in (D, L))
            if d[0] <= budget / (6 * size) <= d[-1]:
                points.append((size, np.exp(np.interp(np.log(budget / (6 * size)), np.log(d), np.log(loss)))))
        if len(points) > 2:
            sizes, losses = np.array(points).T
            c = np.polyfit(np.log(sizes), losses, 2)
            lowest = np.exp(-c[1] / (2 * c[0]))
            if c[0] > 0 and sizes[0] < lowest < sizes[-1]:
                found.append((budget, sizes, losses, c, lowest))
    return found
