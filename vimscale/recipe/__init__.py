"""What is asked: the recipe, its sections, and the YAML they are written in. No torch."""
