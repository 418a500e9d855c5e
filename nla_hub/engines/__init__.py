"""Engines: what runs an AV. Each implements `base.Engine` and is found through `nla_hub.registry.engines`."""
