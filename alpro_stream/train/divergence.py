"""Whether a loss goes where no training comes back from: a pure decision over the values that are logged."""

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from pydantic import Field

from alpro_stream.config import Config

# Fewer values say nothing of what is usual.
_FEWEST = 10


class DivergenceConfig(Config):
    """What is done when a loss is not a number, or jumps. Looked at with every line of metrics, and before a save."""

    on_nan: Literal["stop", "warn"] = "stop"
    """Values that are not finite. `stop` ends the run with nothing of the step saved; `warn` says it and goes on."""
    spike: float | None = Field(default=None, gt=1)
    """A loss of so many times the median of its last values is a jump; null looks for none."""
    window: int = Field(default=50, ge=_FEWEST, le=10**6)
    """How many values that median is of; with fewer than 10 nothing is a jump yet."""
    on_spike: Literal["stop", "warn"] = "warn"
    """Jumps; as `on_nan`."""


class Verdict(NamedTuple):
    """What to do about a step, and what is wrong with it."""

    action: Literal["stop", "warn"]
    wrong: str


class LossWatch:
    """Remembers the last values of each loss; those of jumps are not among them."""

    def __init__(self, config: DivergenceConfig) -> None:
        self._config = config
        self._recent: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=config.window))

    def recall(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Takes in what an earlier sitting of the run has logged, so that a jump is one in the next sitting too."""
        for line in lines:
            self.judge({name: value for name, value in line.items() if isinstance(value, float)})

    def judge(self, values: Mapping[str, float]) -> Verdict | None:
        """What to do about the values of a step; None where nothing is wrong with them.

        Args:
            values: by name; all have to be finite, and those named ``loss/...`` must not jump.
        """
        broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        jumps = []
        for name, value in values.items():
            if name.startswith("loss/") and math.isfinite(value):
                recent = self._recent[name]
                usual = statistics.median(recent) if len(recent) >= _FEWEST else math.inf
                if self._config.spike is not None and value > self._config.spike * usual:
                    jumps.append(f"{name} is {value:.4g}, {value / usual:.1f} times its usual {usual:.4g}")
                else:
                    recent.append(value)
        if broken:
            return Verdict(self._config.on_nan, ", ".join(broken))
        return Verdict(self._config.on_spike, ", ".join(jumps)) if jumps else None
