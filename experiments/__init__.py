"""The composition root: settings to stages, stages to records, records to tables and figures."""
