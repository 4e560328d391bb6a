"""BI-BAU (U): untargeted, for when the attacker's target class is not known (Eq. 27)."""

from functools import partial

from bibau_jax.defenses import bibau

purify = partial(bibau.purify, targeted=False)
check = partial(bibau.check, targeted=False)
