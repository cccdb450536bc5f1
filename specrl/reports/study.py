"""Saves the plots of a hyperparameter study."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np


def save_plot(draw: Callable[[], Any], path: Path) -> None:
    """Save what one of Optuna's matplotlib functions draws, unless the study has too few trials for it.

    Args:
        draw: draws a figure of its own and returns its axes, one or an array of them.
        path: of the PNG file.
    """
    plt.switch_backend("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's notes on experimental functions and on parameters with one value
        try:
            axes = np.ravel(draw())
        except (ValueError, RuntimeError):
            return
        figure = axes[0].figure
        figure.set_size_inches(max(7.0, 3.2 * len(axes)), 4.2)
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)
