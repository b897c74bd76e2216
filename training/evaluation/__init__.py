"""Measuring finished networks: metrics, tests, tables, figures, the report."""
