"""An example plug-in of nla-hub. Its parts are announced by the entry points in pyproject.toml and imported on first use."""
