"""Error analysis of a run: mistakes, attribution maps, calibration, robustness, report."""
