"""A labeler for training recipes (`labels: {labeler: last-words}`)."""

from __future__ import annotations

from collections.abc import Sequence

from nla_hub.training.labelers import LabelRequest


class LastWords:
    """Labels an activation with the last words read: a baseline that needs no other model."""

    words = 5

    def label(self, requests: Sequence[LabelRequest]) -> list[str | None]:
        """One label a request; None for conversations, and where nothing was read yet."""
        found: list[str | None] = []
        for request in requests:
            content = request.document.content
            read = content[: request.char_end].split() if isinstance(content, str) else []
            found.append(" ".join(read[-self.words :]) or None)
        return found
