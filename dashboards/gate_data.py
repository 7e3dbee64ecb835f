"""What a gate left in the store, read by SQL: its comparisons, and the turns of every process pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..results.gate import Noise
from .query import Answer, ask

if TYPE_CHECKING:
    import duckdb

COMPARISONS = """
SELECT kind, label, metric, clock, base_value, candidate_value, unit, ratio, lo, hi, verdict, pairs, turns, p, q,
       margin, asked, tau, detectable, reason, moved, base, candidate, base_case, case_key
FROM comparisons WHERE run_id = $run_id AND kind IS NOT NULL
ORDER BY list_position(['broken', 'regressed', 'missing', 'inconclusive', 'improved', 'equivalent'], verdict)
         NULLS LAST,
         list_position(['case', 'time', 'accuracy', 'metric'], kind) NULLS FIRST, label, metric, case_key
"""

PAIRS = """
WITH calls AS (
  SELECT case_key, clock, pair, side, unnest(turn) AS turn, unnest(ns) AS ns FROM turns WHERE run_id = $run_id
), minima AS (           -- the shortest call of a turn, at least 1 ns
  SELECT case_key, clock, pair, side, turn, greatest(min(ns), 1) AS ns FROM calls
  GROUP BY case_key, clock, pair, side, turn
), ratios AS (           -- of the same turn of the same process pair
  SELECT case_key, clock, other.side, pair, ln(other.ns / base.ns) AS log_ratio
  FROM minima base JOIN minima other USING (case_key, clock, pair, turn)
  WHERE base.side = 'base' AND other.side IN ('candidate', 'again')
)
SELECT case_key, clock, side, pair, count(*) AS turns, exp(median(log_ratio)) AS ratio,
       exp(quantile_cont(log_ratio, 0.25)) AS quarter, exp(quantile_cont(log_ratio, 0.75)) AS three_quarters
FROM ratios SEMI JOIN (SELECT case_key, clock FROM comparisons WHERE run_id = $run_id AND kind = 'time')
                   USING (case_key, clock)
GROUP BY case_key, clock, side, pair ORDER BY case_key, clock, side DESC, pair
"""


@dataclass(frozen=True)
class Gate:
    """One gate: a row for each quantity that was judged, and one for each process pair of each case and side."""

    comparisons: Answer
    pairs: Answer

    def __bool__(self) -> bool:
        """Whether the run is a gate at all."""
        return bool(self.comparisons.rows)

    @property
    def judged(self) -> int:
        """Number of quantities with a verdict."""
        return sum(row["kind"] != "case" for row in self.comparisons.rows)

    @property
    def sides(self) -> tuple[str | None, str | None]:
        """Names of base and candidate."""
        first = self.comparisons.rows[0]
        return first["base"], first["candidate"]

    @property
    def noise(self) -> Noise | None:
        """What the A/A check found; None where no time was judged."""
        for row in self.comparisons.rows:
            if row["tau"] is not None and row["asked"] is not None:
                again = sum(pair["side"] == "again" for pair in self.pairs.rows)
                return Noise(row["tau"], None, row["detectable"], row["asked"], again)
        return None


def load_gate(connection: duckdb.DuckDBPyConnection, run_id: str) -> Gate:
    """Return what the gate of a run found; it is empty for every other run."""
    comparisons = ask(connection, COMPARISONS, run_id=run_id)
    return Gate(comparisons, ask(connection, PAIRS, run_id=run_id))
