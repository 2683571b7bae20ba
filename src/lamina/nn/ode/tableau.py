"""Coefficients of embedded Runge-Kutta pairs, and of the stochastic one: numbers only.

Sources: Dormand, Prince, A family of embedded Runge-Kutta formulae (1980), with Shampine's error weights, as in SciPy
and torchdiffeq; Tsitouras, Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption
(2011), table 1; Roessler, Runge-Kutta methods for the strong approximation of solutions of stochastic differential
equations (2010), SRI2W1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.errors import LaminaError, nearest

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    """An explicit pair of orders 5 and 4 whose last stage is the first of the next step."""

    name: str
    nodes: Row
    """c_2 ... c_7: where in the step a stage is taken, 0..1."""
    stages: tuple[Row, ...]
    """Rows of a, one for each of the stages 2 ... 7; the last row are the weights of the solution."""
    error: Row
    """Weights of order 5 minus those of order 4, one a stage; they sum to 0."""
    middle: Row
    """Weights of the solution halfway through the step, for dense output."""
    stability: float
    """Length of the stability region along the negative axis, by which stiffness is measured."""
    order: int = 5


@dataclass(frozen=True)
class StochasticTableau:
    """A four-stage method of strong order 1.5 for Ito equations with diagonal noise."""

    nodes: tuple[Row, Row]
    """c0, c1: of drift and of diffusion."""
    drift: tuple[tuple[Row, ...], tuple[Row, ...]]
    """A0, A1: what drift adds to the arguments of drift and of diffusion; a row for each of the stages 2 ... 4."""
    noise: tuple[tuple[Row, ...], tuple[Row, ...]]
    """B0, B1: what diffusion adds to them."""
    alpha: Row
    beta: tuple[Row, Row, Row, Row]


DOPRI5 = Tableau(
    "dopri5",
    nodes=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    stages=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    error=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    middle=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
    stability=3.3066,
)

_TSIT5_SOLUTION = (
    0.09646076681806522951816731316512876,
    0.01,
    0.4798896504144995747752495322905965,
    1.379008574103741893192274821856872,
    -3.290069515436080679901047585711363,
    2.324710524099773982415355918398765,
)


_TSIT5_INTERPOLANT = (
    (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
    (0.0, 0.13169999999999998, -0.2234, 0.1017),
    (0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
    (0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
    (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
    (0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
    (0.0, 1.5, -4.0, 2.5),
)
"""Per stage, the coefficients of x ... x**4 in its weight at the fraction x of a step."""

TSIT5 = Tableau(
    "tsit5",
    nodes=(0.161, 0.327, 0.9, 0.9800255409045096857298102862870245955, 1.0, 1.0),
    stages=(
        (0.161,),
        (-0.008480655492356988544426874250230775, 0.3354806554923569885444268742502308),
        (
            2.897153057105493432130432594192939,
            -6.359448489975074843148159912383826,
            4.362295432869581411017727318190887,
        ),
        (
            5.325864828439256604428877920840512,
            -11.74888356406282787774717033978578,
            7.495539342889836208304604784564358,
            -0.09249506636175524925650207933207192,
        ),
        (
            5.861455442946420028659251486982648,
            -12.92096931784710929170611868178336,
            8.159367898576158643180400794539253,
            -0.07158497328140099722453054252582974,
            -0.02826905039406838290900305721271224,
        ),
        _TSIT5_SOLUTION,
    ),
    error=(
        0.001780011052225771443378550607539535,
        0.0008164344596567469032236360633546363,
        -0.007880878010261996010314727672526380,
        0.1447110071732629072372107838328370,
        -0.5823571654525552250199376106520422,
        0.4580821059291869466616365188325542,
        -1 / 66,
    ),
    middle=tuple(sum(c * 0.5 ** (i + 1) for i, c in enumerate(row)) for row in _TSIT5_INTERPOLANT),
    stability=3.5068,
)

TABLEAUS: dict[str, Tableau] = {t.name: t for t in (TSIT5, DOPRI5)}

SRI2W1 = StochasticTableau(
    nodes=((0.0, 1.0, 0.5, 0.0), (0.0, 0.25, 1.0, 0.25)),
    drift=(((1.0,), (0.25, 0.25), (0.0, 0.0, 0.0)), ((0.25,), (1.0, 0.0), (0.0, 0.0, 0.25))),
    noise=(((0.0,), (1.0, 0.5), (0.0, 0.0, 0.0)), ((-0.5,), (1.0, 0.0), (2.0, -1.0, 0.5))),
    alpha=(1 / 6, 1 / 6, 2 / 3, 0.0),
    beta=(
        (-1.0, 4 / 3, 2 / 3, 0.0),
        (1.0, -4 / 3, 1 / 3, 0.0),
        (2.0, -4 / 3, -2 / 3, 0.0),
        (-2.0, 5 / 3, -2 / 3, 1.0),
    ),
)


def tableau_of(method: str) -> Tableau:
    """Return the tableau of an adaptive method.

    Raises:
        LaminaError: there is none, such as for a method of fixed steps, which has no error estimate.
    """
    if method not in TABLEAUS:
        known = ", ".join(map(repr, TABLEAUS))
        raise LaminaError(
            f"method must be an embedded Runge-Kutta pair, {known}, as only those estimate an error; got {method!r}"
            f"{nearest(method, TABLEAUS)}"
        )
    return TABLEAUS[method]


@functools.lru_cache(maxsize=16)
def rows(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return as tensors the rows of stages 2 ... 7, that of the error, and that of the middle."""
    found = (*tableau.stages, tableau.error, tableau.middle)
    return tuple(torch.tensor(row, dtype=dtype, device=device) for row in found)
