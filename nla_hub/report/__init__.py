"""Explanations as HTML: the page of a job, and the view that notebooks show. Everything is escaped, nothing is fetched."""

from nla_hub.report.notebook import page, table

__all__ = ["page", "table"]
