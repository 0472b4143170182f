"""Learning an identity, on anything that denoises."""
