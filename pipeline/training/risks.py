"""The risks of all training slides, as last computed, from which a Cox target has its baseline hazard.

The partial likelihood compares each slide that had its event with all that were still at risk, and a step has only a
few of them. The others are remembered.

Shape letters: B slides of a batch, N training slides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster import Context
from nested_ats.targets import Cox, cumulative_hazard
from pipeline.data.manifest import Entry
from pipeline.data.targets import row_of, truth
from pipeline.sections import CoxTarget


class RiskMemory:
    """Remembers the log hazard ratio of every training slide; all workers remember the same.

    Attributes
    ----------
    log_risks
        (N,) float64; 0 until a slide was seen.
    """

    def __init__(self, config: CoxTarget, training: Sequence[Entry]) -> None:
        outcomes = truth(Cox(), config, [row_of(entry) for entry in training])
        self._times, self._events = outcomes.T.contiguous()
        self._places = {entry.slide_id: place for place, entry in enumerate(training)}
        self.log_risks = torch.zeros(len(training), dtype=torch.float64)
        self._new = torch.zeros(2, len(training), dtype=torch.float64)  # of this step: values, and whose they are

    def truth(self, outcomes: Tensor) -> Tensor:
        """Turn times and events into what the loss of `Cox` takes: (B, 2) -> (B, 2) float32."""
        hazard = cumulative_hazard(self._times, self.log_risks, self._events, outcomes[:, 0])
        return torch.stack([hazard, outcomes[:, 1]], -1).float()

    def keep(self, batch: Sequence[Entry], log_risks: Tensor) -> None:
        """Take down the log hazard ratios, (B,), of the slides of a batch; `gather` makes them known."""
        places = [self._places[entry.slide_id] for entry in batch]
        self._new[0, places] = log_risks.detach().double().cpu()
        self._new[1, places] = 1

    def gather(self, context: Context) -> None:
        """Remember what all workers have kept in this step."""
        new = self._new.to(context.device)
        context.all_reduce(new)
        values, kept = new.cpu()
        self.log_risks = torch.where(kept > 0, values, self.log_risks)
        self._new.zero_()
