"""BI-BAU in JAX/Flax: implant backdoors, unlearn them, and show whether they are gone."""

__version__ = "0.1.0"
