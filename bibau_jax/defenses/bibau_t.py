"""BI-BAU (T): targeted at a class known or suspected to be the attacker's (Eq. 22)."""

from functools import partial

from bibau_jax.defenses import bibau

purify = partial(bibau.purify, targeted=True)
check = partial(bibau.check, targeted=True)
