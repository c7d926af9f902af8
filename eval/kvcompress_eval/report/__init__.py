"""The report: one self-contained HTML page, and a Markdown table for a README or a model card."""

from kvcompress_eval.report.markdown import markdown_table, write_table
from kvcompress_eval.report.page import render, write_report

__all__ = ["markdown_table", "render", "write_report", "write_table"]
