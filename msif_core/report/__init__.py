"""An attribution as one self-contained page."""

from msif_core.report.page import render

__all__ = ["render"]
