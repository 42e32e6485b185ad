"""How sure: the delete-one-group jackknife.

Groups of prompts differ in size, so this is the delete-m_j jackknife of Busing, Meijer and van der Leeden (1999),
"Delete-m jackknife for unequal m"; with equal groups it is the ordinary one.
"""

from __future__ import annotations

import numpy as np


def pseudo_values(full: np.ndarray, without: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[G, ...] what each group by itself says of the number: `h_j full - (h_j - 1) without_j`, `h_j = n / m_j`.

    Args:
        full: [...] the number from all groups.
        without: [G, ...] the number refitted without each group.
        sizes: [G] measured positions in each group, all above 0.
    """
    h = (sizes.sum() / sizes).reshape(-1, *(1,) * np.ndim(full))
    return h * full - (h - 1) * without


def standard_error(full: np.ndarray, without: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[...] jackknife standard error of `full`; NaN with fewer than two groups. Arguments as in `pseudo_values`."""
    groups = len(sizes)
    if groups < 2:
        return np.full(np.shape(full), np.nan)
    h = (sizes.sum() / sizes).reshape(-1, *(1,) * np.ndim(full))
    share = 1 / h
    estimate = groups * full - np.sum((1 - share) * without, axis=0)
    return np.sqrt(np.mean((pseudo_values(full, without, sizes) - estimate) ** 2 / (h - 1), axis=0))
