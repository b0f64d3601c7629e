"""Bootstrap over images: sentences of one image share its difficulty, so that they are drawn together."""

import numpy as np

_AT_ONCE = 4_000_000


def resampled_sums(values: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """Sum n rows, drawn n times with replacement, again and again.

    Args:
        values: (n, k) what each of n images contributes.
        resamples: How often n images are drawn.
        seed: Of the drawing; the same seed and n draw the same images.

    Returns:
        (resamples, k) float64; exact for whole numbers while a sum stays below 2^53.
    """
    generator, n = np.random.default_rng(seed), len(values)
    values = np.asarray(values, dtype=np.float64)
    rows = max(_AT_ONCE // n, 1)
    sums = []
    for start in range(0, resamples, rows):
        now = min(rows, resamples - start)
        drawn = generator.integers(n, size=(now, n)) + n * np.arange(now)[:, None]
        times = np.bincount(drawn.ravel(), minlength=now * n).reshape(now, n)
        sums.append(times.astype(np.float64) @ values)
    return np.concatenate(sums)


def interval(found: np.ndarray) -> list[float]:
    """Give the 2.5 and 97.5 per cent quantiles of (resamples) numbers."""
    return [float(bound) for bound in np.quantile(found, (0.025, 0.975))]


def two_sided_p(differences: np.ndarray) -> float:
    """Give twice the share of resampled differences beyond zero, on the side where fewer are.

    One resample at zero is added, so that p is never 0: at least 2 / (resamples + 1).
    """
    beyond = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return min(1.0, 2 * (beyond + 1) / (len(differences) + 1))
