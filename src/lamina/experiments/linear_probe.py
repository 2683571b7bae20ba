"""What a frozen encoder knows: linear models on its features, judged on rows they were not fitted to."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lamina.errors import LaminaError, ShapeError, require

STRENGTHS = tuple(10.0**k for k in range(-2, 3))
"""C of the classifiers, alpha of the ridge, chosen on the rows each is fitted to."""


def linear_probe(
    features: Tensor,
    targets: Tensor,
    task: Literal["classify", "regress"] = "classify",
    folds: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Fit a linear model to frozen features in all but one fold, judge it in that one, and return the means over folds.

    Features are standardised, by the rows that a model is fitted to. "classify": logistic regression, C of 0.01 to 100
    by the balanced accuracy of inner folds; `balanced_accuracy`, and `auc` where there are two classes. "regress":
    ridge, alpha of 0.01 to 100 by the R2 of inner folds; `mae`, in the targets' unit, `r2`, and `constant_mae`: that
    of the median, whatever the features.

    Args:
        features: (N, d), of an encoder in evaluation mode.
        targets: (N,) class numbers, or numbers.
        folds: outer and inner, at least 2; stratified where there are classes.
        seed: of the folds.
    Raises:
        ShapeError: no (N, d) and (N,). LaminaError: numbers that are not finite, or fewer rows of a class than folds.
        MissingExtra: scikit-learn is not installed.
    Source: Barbano et al. (2024), arXiv 2408.07079, section 4 (which classifies by saga; the problem is convex, and
        lbfgs finds the same).
    """
    if features.dim() != 2 or targets.shape != features.shape[:1]:
        raise ShapeError(
            f"linear_probe takes features (N, d) and targets (N,), got {tuple(features.shape)} {tuple(targets.shape)}"
        )
    if task not in ("classify", "regress"):
        raise LaminaError(f"task must be 'classify' or 'regress', got {task!r}")
    x, y = features.detach().double().cpu().numpy(), targets.detach().cpu().numpy()
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        raise LaminaError("linear_probe got features or targets that are not finite")
    rarest = int(np.unique(y, return_counts=True)[1].min()) if task == "classify" else len(y)
    if not 2 <= folds <= rarest or (task == "classify" and rarest == len(y)):
        what = "rows of the rarest class, of at least two" if task == "classify" else "rows"
        raise LaminaError(f"folds must be from 2 to the number of {what}, {rarest}, got {folds}")
    selection = require("sklearn.model_selection", "experiments")
    split = selection.StratifiedKFold if task == "classify" else selection.KFold
    found = []
    for fit, held in split(folds, shuffle=True, random_state=seed).split(x, y):
        mean, deviation = x[fit].mean(0), x[fit].std(0)
        scaled = (x - mean) / np.where(deviation > 0, deviation, 1.0)
        model = _fitted(task, scaled[fit], y[fit], folds)
        found.append(_judged(model, scaled[held], y[held], y[fit], task))
    return {name: float(np.mean([f[name] for f in found])) for name in found[0]}


def _fitted(task: str, x: Any, y: Any, folds: int) -> Any:
    linear = require("sklearn.linear_model", "experiments")
    if task == "regress":
        # Rows in their order: the outer folds are drawn.
        return linear.RidgeCV(STRENGTHS, scoring="r2", cv=min(folds, 5)).fit(x, y)
    inner = min(folds, 5, int(np.unique(y, return_counts=True)[1].min()))
    split = require("sklearn.model_selection", "experiments").StratifiedKFold(max(inner, 2))
    with warnings.catch_warnings():
        # A weakly regularised one that has not converged loses the search by its score.
        warnings.filterwarnings("ignore", "lbfgs failed to converge")
        told = {c: _inner_score(linear, c, x, y, split) for c in STRENGTHS}
        return linear.LogisticRegression(C=max(told, key=lambda c: told[c]), max_iter=1000).fit(x, y)


def _inner_score(linear: Any, strength: float, x: Any, y: Any, split: Any) -> float:
    score, model = require("sklearn.metrics", "experiments").balanced_accuracy_score, linear.LogisticRegression
    fitted = [(model(C=strength, max_iter=1000).fit(x[f], y[f]), h) for f, h in split.split(x, y)]
    return float(np.mean([score(y[h], m.predict(x[h])) for m, h in fitted]))


def _judged(model: Any, x: Any, y: Any, fitted: Any, task: str) -> dict[str, float]:
    metrics = require("sklearn.metrics", "experiments")
    guess = model.predict(x)
    if task == "regress":
        constant = np.abs(y - np.median(fitted)).mean()
        return {"mae": np.abs(guess - y).mean(), "r2": metrics.r2_score(y, guess), "constant_mae": constant}
    found = {"balanced_accuracy": metrics.balanced_accuracy_score(y, guess)}
    if len(model.classes_) == 2:
        found["auc"] = metrics.roc_auc_score(y, model.decision_function(x))
    return found
