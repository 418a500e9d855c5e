"""The one logger of the package. Libraries stay quiet; the command line shows it on stderr."""

from __future__ import annotations

import logging

logger = logging.getLogger("nla_hub")
logger.addHandler(logging.NullHandler())
