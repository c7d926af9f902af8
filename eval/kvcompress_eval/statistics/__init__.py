"""Statistics of scores between 0 and 1.

`intervals`: intervals of a mean, of a paired and of an unpaired difference. `paired`: a candidate against the baseline,
sample by sample. `verdicts`: what a set of such comparisons allows to claim at once.
"""

from kvcompress_eval.statistics.intervals import (
    Interval,
    bootstrap_interval,
    independent_interval,
    mean_interval,
    paired_interval,
)
from kvcompress_eval.statistics.paired import Comparison, compare, mcnemar
from kvcompress_eval.statistics.verdicts import ALPHA, Verdict, holm, verdicts

__all__ = [
    "ALPHA",
    "Comparison",
    "Interval",
    "Verdict",
    "bootstrap_interval",
    "compare",
    "holm",
    "independent_interval",
    "mcnemar",
    "mean_interval",
    "paired_interval",
    "verdicts",
]
