"""How fast the project is, against the plain way of doing the same."""
