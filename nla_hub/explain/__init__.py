"""Batch explanation of data sets: `run_job`, what it is asked for, and what it leaves behind. Guide: docs/explain.md."""

from __future__ import annotations

from nla_hub.explain.job import run_job
from nla_hub.explain.progress import JobProgress, JobSummary
from nla_hub.explain.result import JobResult
from nla_hub.explain.settings import DataSettings, JobSettings, PairSettings, Shard

__all__ = [
    "DataSettings",
    "JobProgress",
    "JobResult",
    "JobSettings",
    "JobSummary",
    "PairSettings",
    "Shard",
    "run_job",
]
