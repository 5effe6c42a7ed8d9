"""How a model is measured: generation backends, judges, metrics and their intervals."""
