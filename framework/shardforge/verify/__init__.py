"""Pre-flight: a small model of the recipe's kinds, on one process and on the layout, number by number."""
