"""Speed, measured against plain transformers in the same process: what `nla-hub bench` runs (rules: docs/performance.md)."""
