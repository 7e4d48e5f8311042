"""How the step scales: measured here, and a model of it for more machines."""
