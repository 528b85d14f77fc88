"""A self-contained HTML report of a compressed model and the record of its figures, made from other records."""

from act_pipeline.report.content import REPORT_SCHEMA
from act_pipeline.report.write import RECORD_FILENAME, REPORT_FILENAME, write_report

__all__ = ["RECORD_FILENAME", "REPORT_FILENAME", "REPORT_SCHEMA", "write_report"]
