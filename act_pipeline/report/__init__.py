"""One HTML file, and the record of its figures, with all that a person decides by; made from the other stages'
records.
"""

from act_pipeline.report.content import REPORT_SCHEMA
from act_pipeline.report.write import RECORD_FILENAME, REPORT_FILENAME, write_report

__all__ = ["RECORD_FILENAME", "REPORT_FILENAME", "REPORT_SCHEMA", "write_report"]
