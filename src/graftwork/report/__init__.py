"""Reports: one self-contained HTML page for a run, for many, or for the demo; figures are inline SVG, nothing is fetched."""

from .build import finish_run, write_report, write_run_report
from .page import write_page

__all__ = ["finish_run", "write_page", "write_report", "write_run_report"]
