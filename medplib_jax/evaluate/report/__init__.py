"""Reports: `page` shows one run, `sweep` many checkpoints on many tasks."""

from medplib_jax.evaluate.report.page import Example, ReportData, region_masks, write_report
from medplib_jax.evaluate.report.plots import Router

__all__ = ["Example", "ReportData", "Router", "region_masks", "write_report"]
