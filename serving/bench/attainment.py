"""SLO attainment and fairness of one run, from the times of its requests.

Attainment is the share of the requests with targets that met them. Goodput of a run is how many of
those a second it gave; goodput of an engine is the highest rate that `good_enough` accepts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

#: Classes of prompts by their tokens: name, the shortest, and the first that is too long.
LENGTH_CLASSES: tuple[tuple[str, float, float], ...] = (
    ("<1024", 0, 1024),
    ("1024-8191", 1024, 8192),
    (">=8192", 8192, math.inf),
)
#: Attainment that a rate needs to count as goodput: of all requests, and of each length class.
GOOD_OVERALL, GOOD_IN_CLASS = 0.9, 0.8
#: Digits behind the point: seconds to the microsecond, and shares of up to a million requests.
_DIGITS = 6


def summarise(
    *,
    arrival: ArrayLike,
    ttft: ArrayLike,
    tpot: ArrayLike,
    e2e: ArrayLike,
    tokens_in: ArrayLike,
    tokens_out: ArrayLike,
    own: ArrayLike,
    ttft_target: ArrayLike,
    tpot_target: ArrayLike,
    longest_gap: ArrayLike | None = None,
    duration: float | None = None,
) -> dict[str, Any]:
    """Figures of a run; every array has one entry a request, times are seconds.

    `arrival` counts from any zero, `ttft` and `e2e` (to the last token) from the arrival. A `ttft`
    of nan means refused or failed, which misses every target. `own` is the time that the uncached
    part of the prompt takes alone. Targets of nan are none; a request without both is best effort
    and counts for no share. An answer of one token has no TPOT and meets its target. `longest_gap`
    is the longest time between two tokens of an answer. `duration` is from the first arrival to the
    last token unless it is given. What has no request is None. Raises ValueError for arrays of
    different lengths, or of none.

    Jain's index is (sum x)^2 / (n sum x^2) over the mean slow-down ttft / own of each length class
    (Jain, Chiu and Hawe, 1984): 1 when all classes are slowed down alike.
    """
    columns = {
        "arrival": arrival, "ttft": ttft, "tpot": tpot, "e2e": e2e, "tokens_in": tokens_in,
        "tokens_out": tokens_out, "own": own, "ttft_target": ttft_target,
        "tpot_target": tpot_target,
    }  # fmt: skip
    if longest_gap is not None:
        columns["longest_gap"] = longest_gap
    table = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    count = len(table["arrival"])
    if not count or any(column.shape != (count,) for column in table.values()):
        shapes = ", ".join(f"{name} {column.shape}" for name, column in table.items())
        raise ValueError(f"a summary needs arrays of one length above 0, not {shapes}")
    first = table["ttft"]
    served = ~np.isnan(first)
    wait = first - table["own"]
    if duration is None:
        ends = np.where(np.isnan(table["e2e"]), 0.0, table["e2e"]) + table["arrival"]
        duration = float(ends.max() - table["arrival"].min())
    wants_ttft = ~np.isnan(table["ttft_target"])
    wants_tpot = ~np.isnan(table["tpot_target"])
    # Comparisons with nan are false: a request that failed, or that lost its way, misses.
    meets_ttft = first <= table["ttft_target"]
    short = table["tokens_out"] <= 1
    meets_tpot = served & (short | (table["tpot"] <= table["tpot_target"]))
    wants = wants_ttft | wants_tpot
    meets = wants & (meets_ttft | ~wants_ttft) & (meets_tpot | ~wants_tpot)
    row: dict[str, Any] = {
        "n": count,
        "best_effort": int(count - wants.sum()),
        "refused": int(count - served.sum()),
        "attainment": _share(meets, wants),
        "attainment_ttft": _share(meets_ttft, wants_ttft),
        "attainment_tpot": _share(meets_tpot, wants_tpot),
        "ttft_mean_s": _mean(first[served]),
        "ttft_p99_s": _p99(first[served]),
        "max_wait_s": _rounded(wait[served].max()) if served.any() else None,
        "ttft_p99_longest_5pct_s": _p99(first[served & _longest(table["tokens_in"], 0.05)]),
        "goodput_req_s": _rounded(meets.sum() / duration) if duration > 0 else None,
        "jain": None,
    }
    if longest_gap is not None:
        gaps = table["longest_gap"][served & ~short]
        row["longest_gap_p99_s"] = _p99(gaps[~np.isnan(gaps)])
    classes: dict[str, dict[str, Any]] = {}
    slowdowns = []
    for name, least, beyond in LENGTH_CLASSES:
        inside = (table["tokens_in"] >= least) & (table["tokens_in"] < beyond)
        if not inside.any():
            continue
        classes[name] = {
            "n": int(inside.sum()),
            "attainment": _share(meets & inside, wants & inside),
            "ttft_mean_s": _mean(first[served & inside]),
            "ttft_p99_s": _p99(first[served & inside]),
            "wait_mean_s": _mean(wait[served & inside]),
        }
        known = served & inside & (table["own"] > 0)
        if known.any():
            slowdowns.append(float((first[known] / table["own"][known]).mean()))
    row["jain"] = jain(slowdowns)
    row["classes"] = classes
    return row


def jain(values: list[float]) -> float | None:
    """Jain's index of values of at least 0; None when there are none or all are 0."""
    highest = max(values, default=0.0)
    if not highest > 0:
        return None
    parts = np.array(values) / highest  # so that no square leaves the range of numbers
    return _rounded(parts.sum() ** 2 / (len(parts) * (parts**2).sum()))


def good_enough(row: dict[str, Any]) -> bool:
    """Whether a summary's rate counts as goodput: attainment of all and of each length class."""
    shares = [found["attainment"] for found in row["classes"].values()]
    return (row["attainment"] or 0.0) >= GOOD_OVERALL and all(
        share >= GOOD_IN_CLASS for share in shares if share is not None
    )


def _longest(tokens: Floats, share: float) -> NDArray[np.bool_]:
    """The longest prompts, at least that share of all; those of equal length stay together."""
    least = np.sort(tokens)[-math.ceil(share * len(tokens))]
    return np.asarray(tokens >= least)


def _share(met: NDArray[np.bool_], of: NDArray[np.bool_]) -> float | None:
    wanted = int(of.sum())
    return _rounded((met & of).sum() / wanted) if wanted else None


def _mean(values: Floats) -> float | None:
    return _rounded(values.mean()) if len(values) else None


def _p99(values: Floats) -> float | None:
    return _rounded(np.percentile(values, 99)) if len(values) else None


def _rounded(value: Any) -> float:
    return round(float(value), _DIGITS)
