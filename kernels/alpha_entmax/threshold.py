"""Device functions that find the entmax threshold: the only solver of the Triton kernels.

z: scores times (alpha - 1). tau: the threshold, u = max(z - tau, 0), beta = 1 / (alpha - 1); sum u ** beta = 1.
POWER says how u ** (beta - 1) is taken: "linear" where alpha is 1.5 throughout, "constant" where it is 2 throughout,
"general" for any alpha, one per head.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from kernels.common.tiles import INTRINSICS

# Largest step of the threshold (in units of z, at alpha <= 1.5) after which no further refinement is made, and a fifth
# of the largest N - 1 that it may start from: the weighted sum takes the next one to first order, which outputs in 16
# bits do not show
TOLERANCE = {"16 bits": 0.05, "float32": 3e-4}
MAX_STEPS = 20  # a bound only, for rows at the limit of float32
POWERS = {1.5: "linear", 2.0: "constant"}


def power_of(alpha: float | Tensor) -> str:
    """How the kernels take powers: numbers known before the launch can have their own instructions."""
    return "general" if isinstance(alpha, Tensor) else POWERS.get(float(alpha), "general")


@triton.jit
def log2(x):
    """log2 of float32, -inf at 0."""
    if INTRINSICS:  # one instruction (2 ** -22 absolute), tl.log2 about twenty
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def lane_sums(x):
    """[rows, columns] -> [rows, 4]: sums that stay within a thread, as a dot hands a row of its result to four lanes:
    columns 2 i and 2 i + 1 of every eight."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    return tl.sum(tl.sum(tl.reshape(x, (ROWS, COLUMNS // 8, 4, 2)), 3), 1)


@triton.jit
def support_distance(x, z_scale, tau):
    """u = max(z - tau, 0) with z = z_scale * x. tau >= max z - 1 keeps u <= 1, and a multiply-add that saturates to
    [0, 1] is one instruction. NaN becomes 0."""
    return tl.clamp(x * z_scale - tau, 0.0, 1.0)


@triton.jit
def support_power(u, beta, POWER: tl.constexpr):
    """w = u ** (beta - 1), 0 where u is 0. u >= 0, float32."""
    if POWER == "linear":
        return u
    elif POWER == "constant":
        return tl.where(u > 0, 1.0, 0.0)
    else:
        # log2(0) is -inf and exp2 of it exactly 0, as long as the exponent is positive: beta = 1 gets 1e-7
        return tl.exp2(tl.maximum(beta - 1, 1e-7) * log2(u))


@triton.jit
def support_power_and_log(u, beta, POWER: tl.constexpr):
    """support_power(u) and a finite log2(u), from one logarithm."""
    log_u = log2(u)
    if POWER == "general":  # noqa: SIM108
        w = tl.exp2(tl.maximum(beta - 1, 1e-7) * log_u)
    else:
        w = support_power(u, beta, POWER)
    return w, tl.maximum(log_u, -100.0)


@triton.jit
def norm_and_slope(power_sum, slope_sum, alpha, POWER: tl.constexpr):
    """N = (sum u ** beta) ** (1 / beta) and -dN / dtau, for rows with support; N is convex in tau and 1 at the root.

    power_sum: sum u ** beta, slope_sum: sum u ** (beta - 1).
    """
    if POWER == "linear":
        norm = tl.sqrt(power_sum)
    elif POWER == "constant":
        norm = power_sum
    else:
        norm = tl.exp2((alpha - 1) * log2(power_sum))
    return norm, slope_sum * norm / power_sum


@triton.jit
def newton_step(norm, slope):
    """Step of tau by Newton's method on N = 1, 0 for rows without support. From below it never passes the root, from
    above it lands below."""
    return tl.where(slope > 0, (norm - 1) / slope, 0.0)


@triton.jit
def curved_step(norm, slope, last_slope, last_step, alpha):
    """newton_step with the curvature of N that its values and slopes here and one Newton step earlier imply (a cubic
    through both): the error left is of fourth order instead of second. Above alpha 1.6, where N bends at single
    scores, the plain step."""
    known = tl.where(alpha <= 1.6, last_step, 0.0) > 1e-4
    h = tl.where(known, last_step, 1.0)
    fall = last_slope + (1 - norm) / h  # (N there - N here) / h, as that step was (N - 1) / slope
    curvature = tl.maximum((6 * fall - 2 * last_slope - 4 * slope) / h, 0.0)
    curvature = tl.where(known, curvature, 0.0)
    excess = norm - 1
    step = 2 * excess / (slope + tl.sqrt(tl.maximum(slope * slope - 2 * curvature * excess, 0.0)))
    return tl.where(slope > 0, step, 0.0)


@triton.jit
def is_far(step, slope, alpha, tolerance):
    """Whether tau needs a further Newton step, though one has just been taken from where -dN / dtau was `slope`.

    A step is short enough for the last, curved one if it is short in units of z (shorter above alpha 1.5, where less of
    N's bend can be foreseen) and beside the distances u of the keys with weight: step * slope = N - 1. Thousands of
    keys that share a row's weight evenly lie within a hundredth of their threshold.
    """
    largest = tolerance * tl.exp2(-12 * tl.maximum(alpha - 1.5, 0.0))
    return (slope > 0) & ((step > largest) | (step * slope > 5 * tolerance))


@triton.jit
def raise_threshold(z, tau, alpha, beta, STEPS: tl.constexpr, POWER: tl.constexpr):
    """Lower bound of tau from a subset of each row's scores, at least the given bound.

    z: (rows, subset), distinct scores of the row, -inf where there is none. The threshold of a subset is a lower
    bound of the whole row's, and Newton's method climbs to it from the subset's maximum - 1 or any other lower bound.
    """
    tau = tl.maximum(tau, tl.max(z, 1) - 1)
    for _ in tl.static_range(STEPS):
        u = tl.maximum(z - tau[:, None], 0.0)
        w = support_power(u, beta, POWER)
        norm, slope = norm_and_slope(tl.sum(w * u, 1), tl.sum(w, 1), alpha, POWER)
        tau += tl.maximum(newton_step(norm, slope), 0.0)
    return tau
