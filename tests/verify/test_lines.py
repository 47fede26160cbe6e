"""What is said of a rank that failed."""

from moetrain.parallel.ranks import RankError
from moetrain.verify.command import _one_line


def test_the_error_is_named_and_not_the_last_line_of_its_message():
    text = "Traceback:\n  File ...\npack.NarrowError: two rows\nSee elsewhere for\nexamples.\n"
    assert _one_line(RankError(3, 4, "NarrowError", text)) == "rank 3 failed with pack.NarrowError: two rows"
