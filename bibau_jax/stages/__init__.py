"""The stages of an experiment, one file each: `run(this, command)`. What they are given is `bibau_jax.run.Run`."""
