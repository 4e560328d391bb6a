"""Base AT: adversarial training against the backdoored model, BI-BAU without its terms A and B (Table 6); the same code."""

from functools import partial

from bibau_jax.defenses import bibau

purify = partial(bibau.purify, ablation="base_at")
check = partial(bibau.check, ablation="base_at")
