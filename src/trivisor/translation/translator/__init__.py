"""Guest code into host code: instructions into recipes, recipes into blocks."""
