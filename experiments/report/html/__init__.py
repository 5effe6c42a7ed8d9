"""The report as one self-contained HTML page."""

from experiments.report.html.jobs import failures
from experiments.report.html.page import FILE, write

__all__ = ["FILE", "failures", "write"]
