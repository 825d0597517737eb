"""Search strategies: what a stage trains, when ops come, what the alpha loss adds, the result."""
