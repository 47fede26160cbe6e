"""The section ``train.future``: the loss of layers that predict further tokens (``model.future``)."""

from dataclasses import dataclass, field
from typing import Optional

from moetrain.bounds import at_least


@dataclass(frozen=True)
class FutureLossConfig:
    """``weight`` times the mean over these layers of the mean nats of what each is to predict.

    DeepSeek-V3 has 0.3, and 0.1 for the last third of its tokens (arXiv:2412.19437, section 4.2).
    """

    weight: float = field(default=0.3, metadata=at_least(0))
    # from step later_step on; null: weight throughout
    later_weight: Optional[float] = field(default=None, metadata=at_least(0))
    later_step: int = field(default=0, metadata=at_least(0))

    def at(self, step: int) -> float:
        """The weight of step ``step``, from 0."""
        return self.weight if self.later_weight is None or step < self.later_step else self.later_weight
