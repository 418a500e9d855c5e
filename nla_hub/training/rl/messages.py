"""What the alarms of `monitor.py` say to the person who reads them."""

from __future__ import annotations

KL_ADVICE = "Check that beta reaches the trainer and that the reference model is the AV this stage began with."
IGNORED = (
    "Usually the AV writes the same agreeable text for every vector, or the vector does not reach it. Check the warm start "
    "(its loss with shuffled vectors must be higher) and the injection; a contrastive reward pays for telling rows apart."
)
FORMAT = (
    "Only {value:.0%} of the explanations have both tags and words between them. Usually they are cut at max_new_tokens, "
    "or the AV forgets the form it was taught. Look at the statuses: for `truncated` raise max_new_tokens or set a length "
    "penalty, for the others lower lr and raise beta."
)
STILL = "has a learning rate of {lr:.1e}, and its weights change by {value:.1e} (relative) a step: it does not learn."
NOT_HELD = (
    "Usually its parameters are not the ones that the optimizer holds, or 16-bit weights swallow small updates. Check what is "
    "trained; raise its learning rate, or keep float32 weights."
)

MESSAGES = {
    "non_finite/steps": (
        "{value:.0f} optimizer steps in a row had a loss or gradient that is not finite and were left out. Usually a "
        "learning rate is far too high, or 16 bit overflows. Start another run with a lower lr and ar_lr."
    ),
    "logprobs_disagree/sampler": (
        "Trainer and sampler give the same tokens log-probabilities that differ by {value:.1e} (allowed "
        "{limit:.0e}). Usually the vector is lost or misplaced on one of the two sides, or the sampler runs older "
        "weights: the AV would learn from samples that are not its own. Check injection, padding and temperature "
        "on both sides, and when the weights are handed over."
    ),
    "frozen_av/update": f"The AV {STILL} {NOT_HELD} Where reward_std is 0, all samples of a group are paid the same.",
    "frozen_ar/update": f"The AR {STILL} A reward that stands still is gamed sooner or later. {NOT_HELD}",
    "frozen_ar/overtaken": (
        "The second AR, which learns from the same samples, gives the explanations a mean cosine {above:.3f} above that of the "
        "reward's AR; at the beginning it was {start:.3f} below. Usually a stale copy pays: check that the live AR does."
    ),
    "kl_not_applied/absent": (
        "The recipe asks for beta {beta:g}, and the step has no KL divergence at all: nothing holds the AV to its "
        f"beginning. {KL_ADVICE}"
    ),
    "kl_not_applied/zero": (
        "The AV has moved, and its KL divergence to the reference is exactly 0 step after step: the reference is "
        f"the AV itself. {KL_ADVICE}"
    ),
    "kl_not_applied/loss": (
        "The trainer's loss is not the policy term plus the recipe's beta times the KL divergence: it differs by {value:.1e} "
        "(relative; allowed {limit:.0e}). Usually the trainer was set up otherwise: compare its beta and loss with the recipe."
    ),
    "reward_hacking/gap": (
        "The reward's AR gives the explanations a mean cosine {value:.3f} above that of the second AR, which "
        "learns from the same samples and pays nothing; at the beginning it was {start:.3f}. Usually the AV has "
        "found wordings that only this AR understands: a hidden code. Read the eight samples; lower lr and ar_lr, "
        "raise beta, in another run."
    ),
    "vector_ignored/steps": "Explanations fit their own vectors only {value:.3f} better (cosine) than vectors of other rows. "
    + IGNORED,
    "vector_ignored/evaluation": (
        "On held-out rows the FVE is {fve:.3f}, and {permuted:.3f} when the explanations are given to rows of "
        f"other documents. {IGNORED}"
    ),
    "format_lost/steps": FORMAT,
    "format_lost/evaluation": FORMAT,
    "length_explosion/steps": (
        "Explanations are {value:.0f} tokens long on average; at the beginning it was {start:.0f}. Usually the AR learns "
        "too fast and rewards more of anything. Lower ar_lr, or set a length penalty; read the eight samples."
    ),
    "entropy_collapse/steps": (
        "The entropy of the AV's next word fell to {value:.3g} from {start:.3g}. The samples of a group are then "
        "nearly the same text, and nothing is left to learn from. Lower lr, raise beta."
    ),
    "repetition/steps": (
        "{value:.0%} of the word pairs of an explanation are repeated; at the beginning it was {start:.0%}. "
        "Usually the AV says one telling thing several times. Set a repetition penalty, lower lr, raise beta."
    ),
    "precision_falls/evaluation": (
        "{value:.1%} of the facts that held-out explanations name are true; the best evaluation of this run had "
        "{best:.1%}. The reward may still rise while the texts become less true. Start another "
        "run with a lower lr and a higher beta, or with fewer steps."
    ),
}
"""What was seen, what it usually means, what to do: for each alarm and each way in which it can begin."""
