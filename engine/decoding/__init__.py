"""Generation with token-level exits: requests, sampling, the paged cache, and who runs the steps."""
