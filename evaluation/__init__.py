"""How good is a model, who says so, and may it serve? Scores, gates, packages and the registry."""
