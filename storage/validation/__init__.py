"""Tell whether a pyramid is what the converter wrote, and if not, what is wrong and where."""
