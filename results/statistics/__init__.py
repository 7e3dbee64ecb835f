"""Arrays in, intervals out. Knows nothing of benchmarks.

One file for each kind of question: ``order`` (quantiles), ``bootstrap``, ``paired`` (ratios of things taken together,
in several process pairs), ``multiple`` (many answers), ``proportions``, ``noninferiority``, ``series`` (neighbours,
steadiness), ``changes`` (histories). An interval has no bounds where there are too few samples to be honest about.
"""

from .arrays import Interval
from .bootstrap import bootstrap_interval, cluster_bootstrap_interval
from .changes import Change, change_points
from .multiple import benjamini_hochberg
from .noninferiority import mcnemar_p, paired_block_difference, paired_difference
from .order import (
    PERCENTILES,
    correlated_median_interval,
    effective_n,
    median_interval,
    quantile_interval,
    quantile_n_required,
    summary,
)
from .paired import (
    Effect,
    Ratio,
    Tau,
    between_process_tau,
    detectable_effect,
    look_bound,
    median_se,
    paired_effect,
    paired_log_ratio,
)
from .proportions import clopper_pearson, clustered_proportion
from .series import lag1_autocorrelation, steady_start
from .student import student_quantile, student_tail

__all__ = [
    "PERCENTILES",
    "Change",
    "Effect",
    "Interval",
    "Ratio",
    "Tau",
    "benjamini_hochberg",
    "between_process_tau",
    "bootstrap_interval",
    "change_points",
    "clopper_pearson",
    "cluster_bootstrap_interval",
    "clustered_proportion",
    "correlated_median_interval",
    "detectable_effect",
    "effective_n",
    "lag1_autocorrelation",
    "look_bound",
    "mcnemar_p",
    "median_interval",
    "median_se",
    "paired_block_difference",
    "paired_difference",
    "paired_effect",
    "paired_log_ratio",
    "quantile_interval",
    "quantile_n_required",
    "steady_start",
    "student_quantile",
    "student_tail",
    "summary",
]
