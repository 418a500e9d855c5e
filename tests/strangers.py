"""Strategies for what strangers write into YAML."""

from __future__ import annotations

from hypothesis import strategies as st

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | names
    | st.dates()
    | st.just("")
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(names | st.integers() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=8,
)
