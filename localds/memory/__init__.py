"""Where things live: budgets, the latent cache, and the experts."""
