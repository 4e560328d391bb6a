"""The stages of an experiment, one file each: `run(this, command)`. With `bibau_jax.run` the only readers of the config."""
