"""Words that the Hub knows in the front matter of a card, with where it says so.

Read in November 2026. A word that it has learnt since would be refused here, which says so and costs one line.
"""

from __future__ import annotations

LICENCES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3
    llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
    """.split()
)
"""Licence identifiers: https://huggingface.co/docs/hub/repositories-licenses"""

LICENCE_FILES = ("LICENSE", "LICENSE.md")
"""What `license_link` may be besides an address: https://github.com/huggingface/hub-docs/blob/main/modelcard.md"""

RELATIONS = ("adapter", "merge", "quantized", "finetune")
"""`base_model_relation`: https://huggingface.co/docs/hub/model-cards#specifying-a-base-model"""

LANGUAGES_BESIDES = ("code", "multilingual")
"""What `language` may be besides an ISO 639 code of two or three letters: the docstring of huggingface_hub.ModelCardData."""

SIZES = (
    "n<1K",
    "1K<n<10K",
    "10K<n<100K",
    "100K<n<1M",
    "1M<n<10M",
    "10M<n<100M",
    "100M<n<1B",
    "1B<n<10B",
    "10B<n<100B",
    "100B<n<1T",
    "n>1T",
    "other",
)
"""`size_categories` of a data set: the docstring of huggingface_hub.DatasetCardData."""


def size_category(rows: int) -> str:
    """The Hub's word for the size of a data set of `rows` rows."""
    return next((word for i, word in enumerate(SIZES[:-2]) if rows < 1000 * 10**i), "n>1T")
