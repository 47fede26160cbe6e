"""The mirrors of the schemas, in another process."""

from __future__ import annotations

import pickle

from moetrain.config.editable import editable, original
from moetrain.train.options import TrainConfig


def test_a_mirror_is_pickled_by_its_name():
    """Else a job whose launcher pickles the schemas would have classes that equal none of its own."""
    mirror = editable(TrainConfig)
    back = pickle.loads(pickle.dumps(mirror()))
    assert type(back) is mirror
    assert original(type(back)) is TrainConfig
    assert mirror.__name__ == "TrainConfig"
