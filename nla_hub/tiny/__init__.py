"""The tiny world: documents with known latent facts, and the small models that learn from them.

Importing this package loads no torch: only the document generator is re-exported here.
"""

from nla_hub.tiny.world import Document, documents

__all__ = ["Document", "documents"]
