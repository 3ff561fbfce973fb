"""Published models: the arguments that their code takes, their weights in and out, and where they differ from Vim."""
