"""Reports: one self-contained HTML page for a run or for the demo; figures are inline SVG, nothing is fetched."""

from .page import write_page, write_run_report

__all__ = ["write_page", "write_run_report"]
