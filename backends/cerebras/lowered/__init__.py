"""The graph that the vendor's compiler front end makes of a recipe, and what it says."""
