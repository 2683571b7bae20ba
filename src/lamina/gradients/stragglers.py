"""How long coded training takes on workers of which some straggle: a simulator, and the choice of parameters by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lamina.errors import LaminaError, nearest
from lamina.gradients.coding.scheme import GradientCodingScheme, Scheme, UncodedScheme
from lamina.gradients.coding.sequential import MultiplexedScheme, SelectiveRepetitionScheme

Times = NDArray[np.float64]
"""Seconds that each worker takes in each round: (workers, rounds)."""

Family = Literal["uncoded", "gradient_coding", "selective_repetition", "multiplexed_coding"]
FAMILIES: tuple[Family, ...] = ("uncoded", "gradient_coding", "selective_repetition", "multiplexed_coding")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrivalModel:
    """How long workers take when they compute next to nothing: base + exponential, and more while they straggle.

    Each worker is a chain of two states of its own; the defaults are near a profile of 256 serverless workers that the
    authors measured (about 2 % stragglers, 90 % of bursts of one round).

    Example:
        >>> ArrivalModel().draw(256, 80).shape
        (256, 80)
    """

    base: float = 0.55
    """Seconds, >= 0."""
    spread: float = 0.06
    """Mean of the exponential part, seconds."""
    enter: float = 0.02
    """Probability to begin to straggle, a round."""
    leave: float = 0.9
    """Probability to stop straggling, a round."""
    extra: float = 0.65
    """Seconds more while straggling."""
    extra_spread: float = 0.12
    """Mean of the exponential part of those."""

    def __post_init__(self) -> None:
        """Refuse negative times and what is no probability."""
        for name in ("base", "spread", "extra", "extra_spread"):
            if not getattr(self, name) >= 0:
                raise LaminaError(f"{name} must be at least 0 seconds, got {getattr(self, name)!r}")
        for name in ("enter", "leave"):
            if not 0 <= getattr(self, name) <= 1:
                raise LaminaError(f"{name} must be within 0..1, got {getattr(self, name)!r}")

    def draw(self, workers: int, rounds: int, seed: int = 0) -> Times:
        """Draw times: (workers, rounds) in seconds. Every worker begins in its steady state."""
        generator = np.random.default_rng(seed)
        late = np.zeros((workers, rounds), bool)
        chance = self.enter / (self.enter + self.leave) if self.enter + self.leave else 0.0
        state = generator.random(workers) < chance
        for r in range(rounds):
            late[:, r] = state
            turn = generator.random(workers)
            state = np.where(state, turn >= self.leave, turn < self.enter)
        times = self.base + generator.exponential(self.spread, (workers, rounds))
        more = self.extra + generator.exponential(self.extra_spread, (workers, rounds))
        return times + late * more


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a simulated run took."""

    seconds: float
    """From the first round to the last."""
    waits: int
    """Rounds in which the master waited for everyone, because the code would not have borne the stragglers."""
    rounds: NDArray[np.float64]
    """Seconds of every round."""


def simulate(
    scheme: Scheme,
    delays: Times,
    mu: float = 1.0,
    alpha: float = 0.0,
    jobs: int = 80,
    *,
    base_load: float = 0.0,
    compat: Literal["reference"] | None = None,
) -> Simulation:
    """Play a scheme against measured or drawn times; every worker takes delays + alpha (load - base_load).

    A round ends when every worker is done, or at (1 + mu) times the fastest worker's time, if the scheme bears those
    who are not done by then; else it lasts until the last is done, and nobody counts as a straggler.

    Args:
        delays: (workers, at least jobs + the scheme's delay).
        mu: patience, >= 0; infinity waits for everyone.
        alpha: seconds that one worker takes for all of a job's data, >= 0.
        jobs: gradients that are wanted, >= 1.
        base_load: load at which the delays were measured.
        compat: `reference`: gradient coding bears fewer than s, not s, as in the authors' simulator.
    Raises:
        LaminaError: a number out of its range, too few workers or rounds, or times that are not above 0.
    Example:
        >>> simulate(UncodedScheme(2), np.array([[1.0, 2.0], [3.0, 1.0]]), jobs=2).seconds
        5.0
    """
    loads = np.array([scheme.load])
    if isinstance(scheme, (SelectiveRepetitionScheme, MultiplexedScheme)):
        family: Family = (
            "selective_repetition" if isinstance(scheme, SelectiveRepetitionScheme) else "multiplexed_coding"
        )
        found = _play(family, scheme.n, delays, mu, alpha, jobs, base_load, loads, scheme.B, scheme.W, [scheme.lam])
    else:
        bears = [0 if isinstance(scheme, UncodedScheme) else scheme.s - (compat == "reference")]
        found = _play("gradient_coding", scheme.n, delays, mu, alpha, jobs, base_load, loads, 1, 1, bears)
    rounds, waits = found
    return Simulation(float(rounds.sum()), int(waits[0]), rounds[0])


@dataclass(frozen=True, slots=True)
class Choice:
    """The best parameters of one scheme, by simulation."""

    scheme: Scheme
    """Built with them."""
    seconds: float
    """Simulated, for all jobs."""
    tried: int
    """Settings that were compared."""


def select_parameters(
    delays: Times,
    alpha: float,
    schemes: Sequence[Family] = FAMILIES,
    max_delay: int = 4,
    *,
    mu: float = 1.0,
    jobs: int | None = None,
    base_load: float = 0.0,
    max_window: int | None = None,
) -> dict[Family, Choice]:
    """Simulate every setting of every scheme on a profile of the workers, and return the best of each.

    Grid: gradient coding s = 1..n-1; selective repetition lam = 1..n, B = 1..max_delay, W = xB + 1 up to `max_window`;
    multiplexed coding lam = 1..n, B < W, W - 1 + B <= max_delay.

    Args:
        delays: (workers, rounds), measured at `base_load`.
        alpha: seconds for all of a job's data, see `fit_alpha`.
        schemes: to look at.
        max_delay: rounds that a decoded gradient may take, >= 2 for the multiplexed code.
        jobs: of a simulated run; None = rounds - max_delay.
        max_window: largest W; None = `jobs`.
    Raises:
        LaminaError: as `simulate`; an unknown scheme.
    Source: Krishnan, Ebrahimi, Khisti (ICLR 2023), section 4.3 and appendix J.
    """
    for name in schemes:
        if name not in FAMILIES:
            raise LaminaError(f"no scheme is called {name!r}{nearest(name, FAMILIES)}; known: {', '.join(FAMILIES)}")
    times = np.asarray(delays, np.float64)
    if times.ndim != 2:
        raise LaminaError(f"delays must be a matrix (workers, rounds), got shape {times.shape}")
    n, known = times.shape
    jobs = known - max_delay if jobs is None else jobs
    widest = jobs if max_window is None else max_window
    result: dict[Family, Choice] = {}
    for name in schemes:
        best, tried = (np.inf, (0, 0, 0)), 0
        for B, W in _windows(name, max_delay, widest):
            lams = _candidates(name, n, B, W)
            loads = np.array([_build(name, n, B, W, lam).load for lam in lams])
            rounds, _ = _play(name, n, times, mu, alpha, jobs, base_load, loads, B, W, lams)
            totals = rounds.sum(1)
            tried += len(lams)
            at = int(totals.argmin())
            if totals[at] < best[0]:
                best = float(totals[at]), (B, W, lams[at])
        if tried:
            result[name] = Choice(_build(name, n, *best[1]), best[0], tried)
    return result


def fit_alpha(loads: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of time over load by least squares: what one worker would take for all of a job's data.

    Args:
        loads: shares of the data, at least two different ones.
        seconds: mean time of a worker at each.
    """
    if len(loads) != len(seconds) or len(set(loads)) < 2:
        raise LaminaError(
            f"a slope takes times at two loads or more, got {len(set(loads))} loads, {len(seconds)} times"
        )
    return float(np.polyfit(np.asarray(loads, float), np.asarray(seconds, float), 1)[0])


def _windows(name: Family, max_delay: int, widest: int) -> list[tuple[int, int]]:
    if name == "selective_repetition":
        return [(B, W) for B in range(1, max_delay + 1) for W in range(B + 1, widest + 1, B)]
    if name == "multiplexed_coding":
        return [(B, W) for W in range(2, max_delay + 1) for B in range(1, W) if max_delay >= W - 1 + B]
    return [(1, 1)]


def _candidates(name: Family, n: int, B: int, W: int) -> list[int]:
    if name == "uncoded":
        return [0]
    if name == "gradient_coding":
        return list(range(1, n))
    if name == "selective_repetition":
        return [lam for lam in range(1, n + 1) if -(-B * lam // (W - 1 + B)) < n]
    return list(range(1, n + 1))


def _build(name: Family, n: int, B: int, W: int, lam: int) -> Scheme:
    if name == "uncoded":
        return UncodedScheme(n)
    if name == "gradient_coding":
        return GradientCodingScheme(n, lam)
    made = SelectiveRepetitionScheme if name == "selective_repetition" else MultiplexedScheme
    return made(n, B, W, lam)


def _play(
    name: Family,
    n: int,
    delays: Times,
    mu: float,
    alpha: float,
    jobs: int,
    base_load: float,
    loads: NDArray[np.float64],
    B: int,
    W: int,
    lams: Sequence[int],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Play many settings that differ in lam (or s) side by side; return seconds (settings, rounds) and waits."""
    delay = {"selective_repetition": B, "multiplexed_coding": W - 2 + B}.get(name, 0)
    total = jobs + delay
    times = _checked(delays, n, total, mu, alpha, jobs) + 0.0
    shift = alpha * (loads[:, None] - base_load)
    settings = len(loads)
    lam = np.array(lams)
    window = _Window(settings, n, total, B, W)
    repeating = _Repeats(lam, n, total, B, W, jobs) if name == "selective_repetition" else None
    rounds, waits = np.zeros((settings, total)), np.zeros(settings, np.int64)
    for r in range(total):
        now = times[:, r] + shift
        if not now.min() > 0:
            raise LaminaError("a worker would take no time at this load: alpha and base_load do not fit the delays")
        limit, slowest = (1 + mu) * now.min(1), now.max(1)
        late = now > limit[:, None]
        if name in ("uncoded", "gradient_coding"):
            ends = late.sum(1) <= lam
        else:
            ends = window.bursty(r, late, lam)
        late &= ends[:, None]
        rounds[:, r] = np.where(ends, np.minimum(limit, slowest), slowest)
        if repeating is not None:
            idle, counted = repeating.end(r, late)
            rounds[idle, r] = 0.0
            late &= counted[:, None]
            ends |= idle
        waits += ~ends
        window.end(r, late)
    return rounds, waits


class _Window:
    """Running counts of straggling, so that any window is a difference of two rows."""

    def __init__(self, settings: int, n: int, total: int, B: int, W: int) -> None:
        self.B, self.W = B, W
        self.count = np.zeros((total + 1, settings, n), np.int16)
        """Before round r, how many of rounds 0..r-1 a worker straggled in."""

    def bursty(self, r: int, late: NDArray[np.bool_], lam: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say for each setting whether the window that ends in round r is bursty, with these stragglers now."""
        first = max(0, r + 1 - self.W)
        recent = self.count[r] > self.count[first]
        long_ago = self.count[max(first, r + 1 - self.B)] > self.count[first]
        few: NDArray[np.bool_] = (recent | late).sum(1) <= lam
        return few & ~(long_ago & late).any(1)

    def end(self, r: int, late: NDArray[np.bool_]) -> None:
        self.count[r + 1] = self.count[r] + late


class _Repeats:
    """Who repeats in selective repetition, and which rounds count for the master's rule."""

    def __init__(self, lam: NDArray[np.int64], n: int, total: int, B: int, W: int, jobs: int) -> None:
        self.s = -(-B * lam // (W - 1 + B))
        self.n, self.B, self.jobs = n, B, jobs
        self.delivered = np.zeros((total, len(lam), n), bool)

    def end(self, r: int, late: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Record a round; return where nothing had to be done, and where its stragglers count later."""
        again = np.zeros_like(late)
        enough = np.zeros(len(late), bool)
        if r >= self.B:
            without = ~self.delivered[r - self.B]
            over = without.sum(1) - self.s
            enough = over <= 0
            again = without & (without.cumsum(1) <= over[:, None])
        idle = enough & (r >= self.jobs)
        self.delivered[r] = ~late & ~again
        counted = (late.sum(1) > self.s) | again.any(1)
        return idle, counted & ~idle


def _checked(delays: Times, n: int, total: int, mu: float, alpha: float, jobs: int) -> Times:
    times = np.asarray(delays, np.float64)
    if times.ndim != 2 or times.shape[0] < n:
        raise LaminaError(f"delays must be a matrix of {n} workers x rounds, got shape {times.shape}")
    if jobs < 1:
        raise LaminaError(f"jobs must be at least 1, got {jobs}")
    if times.shape[1] < total:
        raise LaminaError(f"{jobs} jobs take {total} rounds, but the delays have {times.shape[1]}")
    if not mu >= 0 or not alpha >= 0:
        raise LaminaError(f"mu and alpha must be at least 0, got mu={mu!r}, alpha={alpha!r}")
    if not (np.isfinite(times).all() and (times > 0).all()):
        raise LaminaError("delays must be finite numbers of seconds above 0")
    return times[:n, :total]
