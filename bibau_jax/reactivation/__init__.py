"""Re-activation: attacks on a purified model that tell a backdoor that is gone from one that is hidden."""
