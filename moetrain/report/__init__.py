"""What a run leaves for a reader: the HTML report, the comparison of arms, and two commands."""

from moetrain.report.commands import report_command, status_command
from moetrain.report.compare import comparison_figure, comparison_table
from moetrain.report.page import write_report

__all__ = ["comparison_figure", "comparison_table", "report_command", "status_command", "write_report"]
