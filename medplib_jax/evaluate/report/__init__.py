"""Reports: `page` shows one run, `sweep` many checkpoints on many tasks."""

from medplib_jax.evaluate.report.page import ReportData, ReportExample, region_masks, write_report
from medplib_jax.evaluate.report.plots import Router

__all__ = ["ReportData", "ReportExample", "Router", "region_masks", "write_report"]
