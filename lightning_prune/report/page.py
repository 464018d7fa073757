"""A report as one self-contained HTML page."""

from __future__ import annotations

import html

from lightning_prune.report.report import Report


def page_of(report: Report) -> str:
    """The page."""
    return f"<!doctype html><title>{html.escape(report.title)}</title><pre>{html.escape(str(report))}</pre>"
